"""Metrics of the gap between trainer and engine, from differences of log-probabilities alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rl.algorithms.rollout_mismatch import mismatch_metrics
from megatron_rl.workers.loss import LossInputs, Totals


def measure(differences: Sequence[Sequence[float]], stale: Sequence[Sequence[float]]) -> dict[str, float]:
    """Metrics of responses whose tokens differ by ``differences`` (trainer minus engine); each has a prompt of 2."""
    rows = [[0.0, *row, 0.0] for row in differences]  # predictor-aligned: one prompt position before, one end after
    mask = [[0, *[1] * len(row), 0] for row in differences]
    starts = [[0, 1, *[0] * len(row)] for row in differences]
    old = [[0.0, *row, 0.0] for row in stale]
    flat = lambda values: torch.tensor([value for row in values for value in row], dtype=torch.float32)  # noqa: E731
    ids = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    fields = {"response_mask": flat(mask).bool(), "staleness": flat(old), "response_starts": flat(starts).bool()}
    inputs = LossInputs(torch.zeros(len(ids)), fields, {}, ids, len(rows), Totals(1, 1))
    metrics = mismatch_metrics(inputs, flat(rows))
    return {name: float(mean.total) / float(mean.weight) for name, mean in metrics.items() if mean.weight}
