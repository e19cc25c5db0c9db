"""Reducing one step's metrics over all ranks, and over rounds of one rank, by what their names say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def reduce_metrics(per_rank: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One number a metric: times and ``_max`` are the maximum over ranks (all wait for the slowest), ``_min``
    the minimum, bytes and ``_count`` the sum, everything else the mean over the ranks that have it."""
    return {name: _reduce(name, numbers) for name, numbers in _by_name(per_rank).items()}


def join_rounds(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One number a metric, of one rank that did the same ``rounds`` times: as `reduce_metrics`, but times add up."""
    return {
        name: sum(numbers) if name.startswith("time/") else _reduce(name, numbers)
        for name, numbers in _by_name(rounds).items()
    }


def _by_name(records: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for metrics in records:
        for name, value in metrics.items():
            values.setdefault(name, []).append(float(value))
    return dict(sorted(values.items()))


def _reduce(name: str, numbers: Sequence[float]) -> float:
    if name.startswith("time/") or name.endswith("_max"):
        return max(numbers)
    if name.endswith("_min"):
        return min(numbers)
    if name.endswith(("_bytes", "_count")):
        return sum(numbers)
    return sum(numbers) / len(numbers)
