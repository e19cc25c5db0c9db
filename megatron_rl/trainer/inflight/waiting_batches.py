"""Batches that wait for their step, in a checkpoint: whole, so that any number of data-parallel ranks can go on.

A training rank holds its share of each; together they are the batch that was sampled, and `share_of` cuts it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_rl.batch import Batch
from megatron_rl.batch.record_bytes import from_bytes, to_bytes
from megatron_rl.parallel import ParallelContext
from megatron_rl.workers.handover import Handed, share_of


def kept(waiting: Sequence[Handed], context: ParallelContext) -> dict[str, Any]:
    """Plain values, equal on all ranks, from which `restored` makes the same batches again; {} of none. Collective."""
    if not waiting:
        return {}
    at = context.coordinates
    own = [_values(handed.batch) for handed in waiting] if context.leads_replica else []
    found = context.gather_objects((at.dp, own))
    shares = [values for _, values in sorted(found, key=lambda part: part[0]) if values]
    metrics = context.gather_objects([handed.batch.metrics for handed in waiting])[0]
    batches = [_joined([share[i] for share in shares]) | {"metrics": metrics[i]} for i in range(len(waiting))]
    last = waiting[-1]
    return {"step": waiting[0].step, "source": dict(last.source), "calls": last.calls, "batches": to_bytes(batches)}


def restored(state: dict[str, Any], context: ParallelContext) -> list[Handed]:
    """This rank's shares of what `kept` was given."""
    handed = []
    for number, values in enumerate(from_bytes(state["batches"])):
        metrics = values.pop("metrics")
        share = share_of(Batch(**values), context.coordinates.dp, context.dp_size)
        share.metrics = metrics if context.rank == 0 else {}
        handed.append(Handed(state["step"] + number, share, state["source"], state["calls"], 0))
    return handed


def _values(batch: Batch) -> dict[str, Any]:
    names = ("prompts", "samples", "sequences", "temperature")
    return {name: getattr(batch, name) for name in names}


def _joined(shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole batch of its parts, in the order of their ranks."""
    whole: dict[str, Any] = {"prompts": [], "samples": [], "temperature": shares[0]["temperature"]}
    for share in shares:
        for sample in share["samples"]:  # copies: they came through the gathering
            sample.group += len(whole["prompts"])
        whole["prompts"] += share["prompts"]
        whole["samples"] += share["samples"]
    names = shares[0]["sequences"]
    return whole | {"sequences": {name: torch.cat([share["sequences"][name] for share in shares]) for name in names}}
