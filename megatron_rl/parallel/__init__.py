"""Parallel coordinates and process groups of one model, always injected, never read from globals elsewhere.

The grid is arithmetic and cheap to import; `ParallelContext` is loaded on first use, because it imports Megatron-Core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rl.parallel.grid import Coordinates, ParallelSizes, RankGrid

if TYPE_CHECKING:
    from megatron_rl.parallel.context import ParallelContext

__all__ = ["Coordinates", "ParallelContext", "ParallelSizes", "RankGrid"]


def __getattr__(name: str) -> object:
    if name == "ParallelContext":
        from megatron_rl.parallel.context import ParallelContext

        return ParallelContext
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
