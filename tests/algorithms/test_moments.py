"""Masked moments and whitening over several data-parallel ranks (threads with a shared all_reduce)."""

from __future__ import annotations

import math
import random
import statistics
import threading

import pytest
import torch
import torch.distributed as dist
from algorithms.ragged import ThreadGroup

from megatron_rl.algorithms.moments import masked_moments, whiten


def on_threads(function, arguments: list[tuple]) -> list:
    results: dict[int, object] = {}

    def run(rank: int) -> None:
        results[rank] = function(*arguments[rank])

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == len(arguments)
    return [results[rank] for rank in range(len(arguments))]


def shards() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three ranks with 5, 0 and 9 kept values far from zero; NaN outside the mask."""
    draw = random.Random(0)
    parts = []
    for size, kept in [(8, 5), (4, 0), (9, 9)]:
        mask = torch.tensor([i < kept for i in range(size)])
        values = torch.tensor([draw.gauss(1000.0, 0.01) for _ in range(size)], dtype=torch.float64)
        parts.append((values.masked_fill(~mask, math.nan), mask))
    return parts


def test_whitening_over_ranks_equals_whitening_of_everything_in_one_place(monkeypatch):
    parts = shards()
    group = ThreadGroup(3)
    monkeypatch.setattr(dist, "all_reduce", group.all_reduce)
    found = on_threads(lambda values, mask: whiten(values, mask, group), parts)
    kept = torch.cat([values[mask] for values, mask in parts]).tolist()
    mean, deviation = statistics.fmean(kept), math.sqrt(statistics.variance(kept) + 1e-8)
    for (values, mask), result in zip(parts, found, strict=True):
        expected = [(v - mean) / deviation if m else 0.0 for v, m in zip(values.tolist(), mask.tolist(), strict=True)]
        assert result.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_two_passes_do_not_cancel_in_fp32_input_far_from_zero():
    values = torch.tensor([10_000.0, 10_001.0, 10_002.0])
    assert masked_moments(values, torch.ones(3, dtype=torch.bool)).variance == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("kept", [0, 1])
def test_moments_of_nothing_or_one_value_have_no_variance_and_whiten_to_zero(kept):
    values = torch.tensor([5.0, math.nan])
    mask = torch.tensor([kept == 1, False])
    moments = masked_moments(values, mask)
    assert (moments.count, moments.mean, moments.variance) == (kept, 5.0 * kept, 0.0)
    assert whiten(values, mask).tolist() == [0.0, 0.0]
