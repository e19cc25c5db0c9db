"""Mismatched prompts and responses, for KTO's estimate of the KL.

Who gets whose response is decided on the whole batch, all data-parallel ranks' shares end to end, so it does not depend
on how many ranks there are; only the responses that cross from one rank to another are sent.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError

T = TypeVar("T")


def partners(prompts: Sequence[Hashable]) -> list[int]:
    """Whose response each sequence gets: a permutation, of another prompt wherever there are enough others.

    Sequences of one prompt are taken together, and all shift by as many as the most frequent prompt has. Distinct
    prompts shift by one, as in TRL's `_get_kl_dataset`; of pairs, chosen ones get chosen ones and rejected rejected
    ones.
    """
    blocks: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        blocks.setdefault(prompt, []).append(index)
    order = [index for members in blocks.values() for index in members]
    shift = max(map(len, blocks.values()), default=0)
    found = [0] * len(order)
    for place, index in enumerate(order):
        found[index] = order[(place + shift) % len(order)]
    return found


def exchange_responses(batch: Batch, group: dist.ProcessGroup | None = None) -> tuple[Batch, Tensor]:
    """Each sequence's prompt followed by its partner's response, and whether that is one to another prompt.

    The prompt is everything before a sequence's first response token; a sequence without any is all prompt and lends
    an empty response. Reads ``input_ids`` and ``response_mask``; only these are in the result.

    Args:
        group: the data-parallel ranks; None for one process. All of them call together.

    Returns:
        This rank's exchanged sequences, and bool ``[num_sequences]``.

    Raises:
        ConfigError: on every rank, when the whole batch has one prompt only.
    """
    rows = [split_row(batch, start, stop) for start, stop in itertools.pairwise(batch.cu_seqlens.tolist())]
    shares = gather_values([digest(prompt) for prompt, *_ in rows], group)
    prompts = [prompt for share in shares for prompt in share]
    if len(set(prompts)) == 1:
        raise ConfigError(
            f"KTO estimates its KL from responses to other prompts, but the whole batch of {len(prompts)} sequences "
            "has one prompt: give it at least 2 prompts (a larger batch), or set estimate_kl=False (z = 0)"
        )
    whom = partners(prompts)
    first = sum(map(len, shares[: group.rank()])) if group is not None else 0
    mine = range(first, first + len(rows))
    lent = {j: rows[j - first][1:] for i, j in enumerate(whom) if j in mine and i not in mine}
    responses = {j: row[1:] for j, row in zip(mine, rows, strict=True)}
    responses |= {j: response for part in gather_values(lent, group) for j, response in part.items()}
    taken = [(prompt, *responses[whom[i]]) for i, (prompt, *_) in zip(mine, rows, strict=True)]
    exchanged = Batch.from_sequences(
        [prompt + response for prompt, response, _ in taken], [[0] * len(prompt) + mask for prompt, _, mask in taken]
    )
    exchanged.temperature = batch.temperature
    return exchanged, torch.tensor([prompts[i] != prompts[whom[i]] for i in mine], dtype=torch.bool)


def split_row(batch: Batch, start: int, stop: int) -> tuple[list[int], list[int], list[int]]:
    """Prompt, response and the response's mask of the sequence between two positions."""
    token_ids = batch["input_ids"][start:stop].tolist()
    mask = batch["response_mask"][start:stop].int().tolist()
    border = mask.index(1) if 1 in mask else len(mask)
    return token_ids[:border], token_ids[border:], mask[border:]


def digest(token_ids: list[int]) -> bytes:
    """The same on every rank for the same tokens."""
    return hashlib.blake2b(torch.tensor(token_ids).numpy().tobytes(), digest_size=16).digest()


def gather_values(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """``value`` of every rank of the group, in rank order."""
    if group is None or group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
