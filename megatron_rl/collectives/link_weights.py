"""How much each link carries: in proportion to the rate at which it moves a few MB alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from megatron_rl.collectives.cost_model import SIZES, Cost
from megatron_rl.collectives.hierarchical import HierarchicalPath

logger = logging.getLogger(__name__)

ROUNDS = 2  # of each measurement; the fastest counts


def weigh_links(path: HierarchicalPath, agree: Callable[[torch.Tensor], None]) -> None:
    """Set the shares of the links; collective, a few seconds.

    Args:
        agree: broadcasts rank 0's fp64 tensor to all ranks, in place.
    """
    pipeline, rows = path.pipeline, []
    all_links = dict(pipeline.shares)
    for index in all_links:
        pipeline.shares = {index: 1.0}
        rows.append([min(_timed(path, size) for _ in range(ROUNDS)) for size in SIZES])
    figures = torch.tensor(rows, dtype=torch.float64)
    agree(figures)
    costs = [Cost.fitted(list(zip(SIZES, row, strict=True))) for row in figures.tolist()]
    shares = {index: 1 / cost.seconds_per_byte for index, cost in zip(all_links, costs, strict=True)}
    pipeline.shares = shares
    if path.rank == 0:
        whole = sum(shares.values())
        parts = ", ".join(f"{pipeline.link_names[k]} {share / whole:.0%}" for k, share in shares.items())
        logger.info("shares of the links between nodes: %s", parts)


def _timed(path: HierarchicalPath, size: int) -> float:
    tensor = torch.zeros(size // 4)
    started = time.perf_counter()
    path.all_reduce(tensor)
    return time.perf_counter() - started
