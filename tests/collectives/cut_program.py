"""Rank of a test on a simulated cluster: sums over and over while a link is cut; arguments: the links.

Exit code 0 when a link was left out and all sums were right, 3 when no link was left.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from megatron_rl.collectives import CollectiveError, CollectivesConfig, NodeMap
from megatron_rl.collectives.hierarchical import HierarchicalPath

LIMIT = 90.0  # seconds

if __name__ == "__main__":
    links = tuple(sys.argv[1:])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, rank == 0)
    path = HierarchicalPath(
        dist.PrefixStore("path", store),
        rank,
        NodeMap.discover(dist.PrefixStore("nodes", store), rank, size),
        CollectivesConfig(links=links, timeout_seconds=6, chunk_mb=0.5),
        torch.device("cpu"),
    )
    started, rounds = time.monotonic(), 0
    try:
        while len(path.pipeline.shares) == len(links) and time.monotonic() - started < LIMIT:
            tensor = torch.full((200_000,), float(rank + 1))
            path.all_reduce(tensor)
            assert bool((tensor == size * (size + 1) / 2).all()), "a wrong sum"
            rounds += 1
            if rounds == 2 and rank == 0:
                print("running", flush=True)
        tensor = torch.full((200_000,), 1.0)
        path.all_reduce(tensor)
        assert bool((tensor == size).all()), "a wrong sum after the cut"
    except CollectiveError as error:
        print(error, flush=True)
        os._exit(3)
    print("left:", ", ".join(path.pipeline.link_names[k] for k in path.pipeline.shares), flush=True)
    os._exit(0 if len(path.pipeline.shares) < len(links) else 4)
