"""Test program under torchrun on 4 ranks: links that fail in mid-operation. Rank 0 prints a line for each case held.

A link that fails is told from a busy machine by a time limit, so this wants a machine that is not overloaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from collectives_program import CPU, MAPS, inputs, ordered_sum, say, store

from megatron_rl.collectives.hierarchical import HierarchicalPath
from megatron_rl.collectives.node_memory import CollectiveError
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.policy import CollectivesConfig


def broken_at(path: HierarchicalPath, link: int, after: int) -> None:
    """Let one lane's exchanges over ``link`` fail from the ``after``-th on."""
    assert path.pipeline._lane is not None
    target, count = path.pipeline._lane.links[link], itertools.count()
    send: Callable[..., dist.Work] = target.send

    def failing(*args: object) -> dist.Work:
        if next(count) >= after:
            raise RuntimeError("cable pulled")
        return send(*args)

    target.send = failing  # type: ignore[method-assign]


def failing_links(rank: int) -> None:
    nodes = NodeMap(MAPS[0])
    for link, after in ((0, 1), (1, 4)):
        path = HierarchicalPath(
            store(),
            rank,
            nodes,
            CollectivesConfig.model_construct(links=("lo", "lo"), chunk_mb=0.02, timeout_seconds=6.0),
            CPU,
        )
        if rank == 3:
            broken_at(path, link, after)
        parts = inputs(20_000, torch.float32)
        for _ in range(2):
            summed = parts[rank].clone()
            path.all_reduce(summed)
            assert torch.equal(summed, ordered_sum(parts, nodes, torch.float32)), f"after link {link} failed"
        assert list(path.pipeline.shares) == [1 - link], "every rank leaves the failed link out"
        say(rank, f"link {link} fails at exchange {after} of one rank")
    path = HierarchicalPath(store(), rank, nodes, CollectivesConfig(links=("lo",), timeout_seconds=6), CPU)
    if rank == 2:
        broken_at(path, 0, 0)
    with pytest.raises(CollectiveError, match="lo"):
        path.all_reduce(inputs(5000, torch.float32)[rank])
    dist.barrier()
    say(rank, "the only link fails: an error on every rank")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    failing_links(dist.get_rank())
    dist.barrier()
    dist.destroy_process_group()
