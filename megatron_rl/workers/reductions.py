"""Reductions over ranks for one optimizer step: the totals that losses are divided by, metrics, the check for NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_rl.batch import Batch
from megatron_rl.devices import current_platform
from megatron_rl.parallel import ParallelContext
from megatron_rl.workers.loss import Mean, Totals


def global_totals(context: ParallelContext, batch: Batch, units: Sequence[int] | None) -> Totals:
    """Global counts of trained tokens, of sequences and of units that have any. The first token of a sequence is never
    trained on: no position predicts it."""
    mask = batch.tokens["response_mask"].clone()
    starts = batch.cu_seqlens[:-1]
    mask[starts[starts < mask.numel()]] = False
    per_sequence = torch.zeros(batch.num_sequences).index_add(0, batch.sequence_ids, mask.float())
    trained = per_sequence > 0
    counted = {unit for unit, kept in zip(units or (), trained.tolist(), strict=False) if kept}
    counts = torch.tensor([float(mask.sum()), float(trained.sum()), float(len(counted))], dtype=torch.float64)
    counts = counts.to(current_platform().device)
    if context.grid.dp > 1:
        dist.all_reduce(counts, group=context.dp_group)
    tokens, sequences, num_units = counts.tolist()
    return Totals(tokens=max(tokens, 1.0), sequences=max(sequences, 1.0), groups=max(num_units, 1.0))


def require_finite(name: str, step: int, values: Mapping[str, float]) -> None:
    """Raise FloatingPointError on every rank unless the values of all ranks are finite numbers. Collective.

    Args:
        name, step: the role and its optimizer step, for the message.
        values: by name, for the message.
    """
    flags = [float(not math.isfinite(value)) for value in values.values()]
    bad = torch.tensor(flags, device=current_platform().device)
    if dist.get_world_size() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    for (what, value), flag in zip(values.items(), bad.tolist(), strict=True):
        if flag:
            raise FloatingPointError(
                f"{name}: the {what} of optimizer step {step} is not finite on some rank ({value} here): "
                "lower the learning rate, or look for NaN rewards or log-probabilities in this step's metrics"
            )


def reduce_metrics(context: ParallelContext, collected: Sequence[dict[str, Mean]]) -> dict[str, float]:
    """Metrics over all ranks that computed some: the last pipeline stage, one rank of each tensor-parallel group. A
    metric of weight 0 is left out: 0 would look like a measurement."""
    sums: dict[str, list[float]] = {}
    if context.coordinates.tp == 0:
        for metrics in collected:
            for name, mean in metrics.items():
                _add(sums, name, float(mean.total), float(mean.weight))
    merged: dict[str, list[float]] = {}
    for part in context.gather_objects(sums):
        for name, (total, weight) in part.items():
            _add(merged, name, total, weight)
    return {name: total / weight for name, (total, weight) in sorted(merged.items()) if weight}


def _add(sums: dict[str, list[float]], name: str, total: float, weight: float) -> None:
    """Totals and weights of means add up; of names that end in ``_max`` the largest is kept."""
    entry = sums.setdefault(name, [0.0, 0.0])
    if name.endswith("_max"):
        entry[:] = max(entry[0], total) if entry[1] else total, 1.0
    else:
        entry[:] = entry[0] + total, entry[1] + weight
