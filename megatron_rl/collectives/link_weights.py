"""How much each link carries: in proportion to the rate at which it moves a few MB alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from megatron_rl.collectives.cost_model import Line
from megatron_rl.collectives.hierarchical import HierarchicalPath

logger = logging.getLogger(__name__)

ROUNDS = 3  # of each measurement; the fastest counts
# Bytes. What a link takes beyond its rate is in both; 1 MB over a link that was idle is all of that kind.
SIZES = (2 << 20, 8 << 20)


def weigh_links(path: HierarchicalPath, largest: Callable[[torch.Tensor], None]) -> None:
    """Set the shares of the links; collective, a few seconds.

    Args:
        largest: the largest of all ranks' fp64 tensors on all ranks, in place; a barrier.
    """
    pipeline, rows = path.pipeline, []
    all_links = dict(pipeline.shares)
    for index in all_links:
        pipeline.shares = {index: 1.0}
        _timed(path, SIZES[-1], largest)  # makes connections and memory
        rows.append([min(_timed(path, size, largest) for _ in range(ROUNDS)) for size in SIZES])
    figures = torch.tensor(rows, dtype=torch.float64)
    largest(figures)
    costs = [Line.fitted(list(zip(SIZES, row, strict=True))) for row in figures.tolist()]
    shares = {index: 1 / cost.seconds_per_byte for index, cost in zip(all_links, costs, strict=True)}
    pipeline.shares = shares
    if path.rank == 0:
        whole = sum(shares.values())
        parts = ", ".join(f"{pipeline.link_names[k]} {share / whole:.0%}" for k, share in shares.items())
        logger.info("shares of the links between nodes: %s", parts)


def _timed(path: HierarchicalPath, size: int, largest: Callable[[torch.Tensor], None]) -> float:
    tensor = torch.zeros(size // 4)
    largest(torch.zeros(1, dtype=torch.float64))
    started = time.perf_counter()
    path.all_reduce(tensor)
    return time.perf_counter() - started
