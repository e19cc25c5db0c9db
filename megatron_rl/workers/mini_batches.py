"""Mini-batches: which sequences one optimizer step sees, the same whatever the data-parallel size.

Units (a sequence, or a preference pair) are numbered over all data-parallel ranks, one seeded permutation of these
numbers is cut into equal parts, and each rank takes its own sequences of a part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def unit_ids(num_sequences: int, groups: Sequence[int] | None) -> list[int]:
    """Number the units of this rank 0, 1, ... in order of first appearance; one number a sequence."""
    if groups is None:
        return list(range(num_sequences))
    order: dict[int, int] = {}
    return [order.setdefault(group, len(order)) for group in groups]


def split_mini_batches(
    units: Sequence[int], counts: Sequence[int], dp_rank: int, parts: int, seed: int
) -> list[list[int]]:
    """This rank's sequences of each mini-batch.

    Args:
        units: unit of each of this rank's sequences, numbered from 0.
        counts: number of units on every data-parallel rank.
        parts: mini-batches; at most one per unit is made.
        seed: the same on every rank; 1 part needs no permutation and keeps the order.
    """
    total, before = sum(counts), sum(counts[:dp_rank])
    parts = max(1, min(parts, total))
    if parts == 1:
        return [list(range(len(units)))]
    places = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    part_of = (places.argsort() * parts // total).tolist()
    return [[i for i, unit in enumerate(units) if part_of[before + unit] == part] for part in range(parts)]
