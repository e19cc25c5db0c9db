"""`NodeMap`: which ranks of a group share a machine, and so its memory.

Each rank publishes its `identity` once through the group's store. All collectives here number nodes by their first
rank, and the ranks of a node in rank order; every sum is taken in that order.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist


def identity() -> str:
    """What ranks of one node have in common: host, boot, and the namespaces of network and processes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    booted = boot.read_text().strip() if boot.exists() else ""
    namespaces = [Path(f"/proc/self/ns/{kind}") for kind in ("net", "pid")]
    seen = [os.readlink(namespace) if namespace.exists() else "" for namespace in namespaces]
    return " ".join([socket.gethostname(), booted, *seen])


@dataclass(frozen=True)
class NodeMap:
    """Ranks of a group by node. ``nodes[i]`` are the group ranks of node i, ascending; nodes by their first rank."""

    nodes: tuple[tuple[int, ...], ...]
    hosts: tuple[str, ...] = field(default=(), compare=False)  # name of each node's machine

    @classmethod
    def of(cls, identities: Sequence[str]) -> NodeMap:
        """From the identity of each rank, in rank order."""
        members: dict[str, list[int]] = {}
        for rank, name in enumerate(identities):
            members.setdefault(name, []).append(rank)
        return cls(tuple(tuple(ranks) for ranks in members.values()), tuple(name.split(" ")[0] for name in members))

    @classmethod
    def discover(cls, store: dist.Store, rank: int, size: int) -> NodeMap:
        """Collective over the group: every rank writes its identity to the store and reads the others'."""
        store.set(f"node/{rank}", identity())
        return cls.of([store.get(f"node/{other}").decode() for other in range(size)])

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return sum(len(ranks) for ranks in self.nodes)

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @functools.cached_property
    def lanes(self) -> int:
        """Ranks of each node that exchange data with other nodes: as many as the smallest node has."""
        return min(len(ranks) for ranks in self.nodes)

    def place(self, rank: int) -> tuple[int, int]:
        """(node, index in the node) of a group rank."""
        for node, ranks in enumerate(self.nodes):
            if rank in ranks:
                return node, ranks.index(rank)
        raise ValueError(f"rank {rank} is not in this group of {self.size}")

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """All ranks, node after node."""
        return tuple(rank for ranks in self.nodes for rank in ranks)

    def first(self, node: int) -> int:
        """How many ranks the nodes before ``node`` have."""
        return sum(len(ranks) for ranks in self.nodes[:node])

    def __str__(self) -> str:
        sizes = sorted({len(ranks) for ranks in self.nodes})
        return f"{self.num_nodes} nodes of {' or '.join(map(str, sizes))} ranks"
