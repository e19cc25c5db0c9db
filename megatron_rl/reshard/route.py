"""`Route`: how one piece of a tensor travels from the ranks that hold it to the ranks that need it.

Ranks that need it and hold it already copy locally. The others stand in chains, each receiver passing the piece on to
the next, so every rank sends a byte at most once, and R replicas cost the holders one send, not R. Inside a node that
has a holder the chain starts there; the ranks of all nodes without a holder are appended to one chain, node after
node, so that a byte crosses into such a node once.
"""

from __future__ import annotations

import bisect
import itertools
from typing import NamedTuple

from megatron_rl.reshard.topology import Topology


class Hop(NamedTuple):
    """``src`` sends the piece to ``dst``; ``depth`` counts the hops before it in the chain (0: ``src`` is a holder)."""

    src: int
    dst: int
    depth: int


class Route:
    """The chains for one set of holders and one set of needers.

    Args:
        holders: source ranks that hold the piece, ascending.
        needers: target ranks that need it, ascending.
    """

    def __init__(self, holders: tuple[int, ...], needers: tuple[int, ...], topology: Topology) -> None:
        self.num_holders = len(holders)
        self.residents = frozenset(holders).intersection(needers)
        self.missing = tuple(rank for rank in needers if rank not in self.residents)
        self._holders = holders
        self._holders_in: dict[int, list[int]] = {}
        for rank in holders:
            self._holders_in.setdefault(topology.node(rank), []).append(rank)
        waiting: dict[int, list[int]] = {}
        for rank in self.missing:
            waiting.setdefault(topology.node(rank), []).append(rank)
        self._home = {node: waiting[node] for node in sorted(waiting) if node in self._holders_in}
        self._away = [waiting[node] for node in sorted(waiting) if node not in self._holders_in]
        self._mine: dict[tuple[int, int], tuple[Hop, ...]] = {}

    @property
    def num_nodes_entered(self) -> int:
        """Nodes that need the piece and have no holder: the least number of times it must cross between nodes."""
        return len(self._away)

    @property
    def num_holder_sends(self) -> int:
        """Sends by holders: one for each node fed by its own holder, or one in all."""
        return max(len(self._home), min(len(self._away), 1))

    def chains(self, share: int) -> list[list[int]]:
        """Each chain is a holder followed by receivers; ``share`` in [0, num_holders) selects among equal holders."""
        chains = []
        for node, waiting in self._home.items():
            local = self._holders_in[node]
            head = local[share * len(local) // self.num_holders]
            start = bisect.bisect(waiting, head) + share * len(waiting) // self.num_holders
            chains.append([head, *_rotated(waiting, start)])
        if self._away:
            start = share * len(self._away) // self.num_holders
            tail = [rank for waiting in _rotated(self._away, start) for rank in waiting]
            if chains:
                chains[share % len(chains)] += tail
            else:
                chains.append([self._holders[share], *tail])
        return chains

    def hops(self, share: int) -> list[Hop]:
        return [
            Hop(src, dst, depth)
            for chain in self.chains(share)
            for depth, (src, dst) in enumerate(itertools.pairwise(chain))
        ]

    def hops_of(self, rank: int, share: int) -> tuple[Hop, ...]:
        """The hops that ``rank`` takes part in: at most one in and one out."""
        key = (rank, share)
        if key not in self._mine:
            self._mine[key] = tuple(hop for hop in self.hops(share) if rank in (hop.src, hop.dst))
        return self._mine[key]


def _rotated(items: list, start: int) -> list:
    start %= len(items)
    return items[start:] + items[:start]
