"""A place among data-parallel replicas, without a model: what loaders ask for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def replica(dp_rank: int, dp_size: int) -> Any:
    """Stands for a `ParallelContext`."""
    return SimpleNamespace(coordinates=SimpleNamespace(dp=dp_rank), dp_size=dp_size)
