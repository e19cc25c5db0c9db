"""Parallel coordinates and process groups of one model, always injected, never read from globals elsewhere."""

from megatron_rl.parallel.grid import Coordinates, ParallelSizes, RankGrid

__all__ = ["Coordinates", "ParallelSizes", "RankGrid"]
