"""`Certificate`: what a plan costs over all ranks, each figure beside its lower bound, and proof that it is exact.

Tensors with the same cuts on both sides cost the same, so each such class is computed once and multiplied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_rl.reshard.index import Pattern, ReplicaRanks, Replicas
from megatron_rl.reshard.plan import ReshardPlan, collector_paused
from megatron_rl.reshard.rectangle import cross, uncovered
from megatron_rl.reshard.route import Route
from megatron_rl.reshard.wire_format import WireFormat


class Measure(NamedTuple):
    """Bytes, and the least that any plan could reach."""

    actual: int
    lower_bound: int

    @property
    def optimal(self) -> bool:
        return self.actual == self.lower_bound

    def __str__(self) -> str:
        excess = f"{self.actual / self.lower_bound:.3f}x" if self.lower_bound else "nothing to do"
        return f"{self.actual:>20,}  {self.lower_bound:>20,}  {'minimal' if self.optimal else excess}"


@dataclass(frozen=True)
class Certificate:
    """Of all ranks together. It exists only if every element that the target covers is written exactly once."""

    name: str
    elements: int  # elements that ranks receive or copy from their source shards, each of them once
    repeated: int  # elements that a rank stores once more, copied from what it received
    received: Measure  # bytes over the wire; bound: what ranks need and do not hold
    resident: int  # bytes that ranks need and hold: copied locally, never sent
    inter_node: Measure  # bytes between nodes; bound: once into each node that needs a byte and has no holder
    holder_egress: Measure  # bytes sent by source ranks from their own shards; bound: once per byte, or, where
    # several nodes can be fed by a holder inside them, once per such node
    max_holder_egress: Measure  # of the busiest source rank; bound: an even division among each group of replicas
    max_egress: int  # bytes sent by the busiest rank, passing on included
    sent: Mapping[int, int]  # rank -> bytes it sends
    received_by: Mapping[int, int]  # rank -> bytes it receives
    sent_outside: Mapping[int, int]  # rank -> those of the bytes it sends that leave its node
    received_outside: Mapping[int, int]  # rank -> those of the bytes it receives that come from another node
    max_depth: int  # hops of the longest chain

    def __str__(self) -> str:
        rows = [
            ("received", self.received),
            ("between nodes", self.inter_node),
            ("sent by holders", self.holder_egress),
            ("busiest holder", self.max_holder_egress),
        ]
        lines = [f"{self.name}", f"{'bytes':18}{'actual':>20}  {'lower bound':>20}"]
        lines += [f"{label:18}{measure}" for label, measure in rows]
        lines += [f"{'resident':18}{self.resident:>20,}"]
        lines += [f"{'busiest rank':18}{self.max_egress:>20,}", f"longest chain: {self.max_depth} hops"]
        lines += [f"coverage: each of {self.elements:,} target elements is written exactly once"]
        if self.repeated:
            lines += [f"stored twice on one rank: {self.repeated:,} elements, copied locally"]
        return "\n".join(lines)


class _Class(NamedTuple):
    """Tensors with the same cuts, senders and dtype."""

    held: Pattern
    shares: tuple[int, ...]
    wanted: Pattern
    itemsize: int


class _Chain(NamedTuple):
    """A chain as positions in the arrays over ranks, and those of its hops that leave a node."""

    ranks: np.ndarray
    leaving: np.ndarray  # positions that send to another node
    entering: np.ndarray  # positions that receive from another node


def certify(plan: ReshardPlan, wire: WireFormat | None = None) -> Certificate:
    """Bytes beside their lower bounds for all ranks together, and proof that coverage is exact.

    Raises:
        ValueError: coverage is not exact.
    """
    with collector_paused():
        return _Auditor(plan, wire or WireFormat()).certificate()


class _Auditor:
    def __init__(self, plan: ReshardPlan, wire: WireFormat) -> None:
        self._plan, self._wire = plan, wire
        self._holders, self._needers = ReplicaRanks(plan.source), ReplicaRanks(plan.target)
        self._at = {rank: i for i, rank in enumerate(plan.ranks)}
        self._nodes = np.array([plan.topology.node(rank) for rank in plan.ranks])
        self._sent = np.zeros(len(plan.ranks), np.int64)
        self._held_sent = np.zeros(len(plan.ranks), np.int64)
        self._received = np.zeros(len(plan.ranks), np.int64)
        self._sent_outside = np.zeros(len(plan.ranks), np.int64)
        self._received_outside = np.zeros(len(plan.ranks), np.int64)
        self._group_sent: Counter[Replicas] = Counter()
        self._totals: Counter[str] = Counter()
        self._max_depth = 0
        self._chains: dict[tuple[Route, int], list[_Chain]] = {}

    def certificate(self) -> Certificate:
        for kind, count in self._classes().items():
            self._count(kind, count)
        total = self._totals
        if total["written"] != total["distinct"]:
            raise ValueError(f"ranks need {total['distinct']} elements, but the plan brings {total['written']}")
        return Certificate(
            name=str(self._plan),
            elements=total["distinct"],
            repeated=self._plan.target_index.num_stored - total["distinct"],
            received=Measure(int(self._received.sum()), total["missing"]),
            resident=total["resident"],
            inter_node=Measure(int(self._sent_outside.sum()), total["must_cross"]),
            holder_egress=Measure(int(self._held_sent.sum()), total["must_leave"]),
            max_holder_egress=Measure(int(self._held_sent.max(initial=0)), self._even_egress()),
            max_egress=int(self._sent.max(initial=0)),
            sent=self._by_rank(self._sent),
            received_by=self._by_rank(self._received),
            sent_outside=self._by_rank(self._sent_outside),
            received_outside=self._by_rank(self._received_outside),
            max_depth=self._max_depth,
        )

    def _classes(self) -> Counter[_Class]:
        source, target = self._plan.source_index, self._plan.target_index
        classes: Counter[_Class] = Counter()
        proved: set[tuple[Pattern, Pattern]] = set()
        for tensor, wanted in target.patterns.items():
            if tensor not in source.tensors:
                raise ValueError(
                    f"{self._plan.target.name} needs {tensor}, which {self._plan.source.name} does not have: check "
                    f"that both layouts describe the same model"
                )
            held, _, shares = source.tensors[tensor]
            if (held, wanted) not in proved:
                self._prove(tensor, held, wanted)
                proved.add((held, wanted))
            for rectangle, replicas in zip(wanted.rectangles, wanted.replicas, strict=True):
                self._totals["distinct"] += rectangle.numel * len(self._needers[replicas])
            classes[_Class(held, shares, wanted, self._wire.of(tensor).itemsize)] += 1
        return classes

    def _prove(self, tensor: str, held: Pattern, wanted: Pattern) -> None:
        """Patterns are disjoint on both sides, so equal areas mean that each wanted element is found exactly once."""
        areas = [0] * len(wanted.rectangles)
        for crossing in cross(held.rectangles, wanted.rectangles):
            areas[crossing.right] += crossing.rectangle.numel
        for rectangle, replicas, area in zip(wanted.rectangles, wanted.replicas, areas, strict=True):
            if area != rectangle.numel:
                rank = self._needers[replicas][0]
                hole = uncovered(rectangle, held.rectangles) or rectangle
                raise ValueError(
                    f"{self._plan.target.name}: rank {rank} needs {tensor}{hole}, which no rank of "
                    f"{self._plan.source.name} holds: check that both layouts describe the same model"
                )

    def _count(self, kind: _Class, count: int) -> None:
        for left, right, rectangle in cross(kind.held.rectangles, kind.wanted.rectangles):
            held_by, needed_by = kind.held.replicas[left], kind.wanted.replicas[right]
            route = self._plan.route(held_by, needed_by)
            numel = rectangle.numel * count
            num_bytes = numel * kind.itemsize
            chains = self._chains_of(route, kind.shares[left])
            receivers = sum(len(chain.ranks) - 1 for chain in chains)
            self._totals["written"] += numel * (receivers + len(route.residents))
            self._totals["resident"] += num_bytes * len(route.residents)
            self._totals["missing"] += num_bytes * len(route.missing)
            self._totals["must_leave"] += num_bytes * route.num_holder_sends
            self._totals["must_cross"] += num_bytes * route.num_nodes_entered
            self._group_sent[held_by] += num_bytes * route.num_holder_sends
            for chain in chains:
                self._sent[chain.ranks[:-1]] += num_bytes
                self._received[chain.ranks[1:]] += num_bytes
                self._held_sent[chain.ranks[0]] += num_bytes
                self._sent_outside[chain.leaving] += num_bytes
                self._received_outside[chain.entering] += num_bytes

    def _chains_of(self, route: Route, share: int) -> list[_Chain]:
        """The route's chains, once it is proved that they end at each rank that misses the piece exactly once."""
        key = (route, share)
        if key not in self._chains:
            chains = route.chains(share)
            receivers = sorted(rank for chain in chains for rank in chain[1:])
            if receivers != sorted(route.missing):
                raise ValueError(f"ranks {route.missing} miss a piece, but the chains {chains} lead to {receivers}")
            self._chains[key] = [self._chain(chain) for chain in chains]
            self._max_depth = max(self._max_depth, *(len(chain) - 1 for chain in chains), 0)
        return self._chains[key]

    def _chain(self, ranks: list[int]) -> _Chain:
        at = np.array([self._at[rank] for rank in ranks])
        nodes = self._nodes[at]
        crosses = nodes[1:] != nodes[:-1]
        return _Chain(at, at[:-1][crosses], at[1:][crosses])

    def _by_rank(self, figures: np.ndarray) -> dict[int, int]:
        return dict(zip(self._plan.ranks, figures.tolist(), strict=True))

    def _even_egress(self) -> int:
        """The busiest holder cannot send less than the average over any set of ranks that must send something alone."""
        groups = {frozenset(replicas): num_bytes for replicas, num_bytes in self._group_sent.items() if num_bytes}
        single = {next(iter(replicas)): num_bytes for replicas, num_bytes in groups.items() if len(replicas) == 1}
        shared = {replicas: num_bytes for replicas, num_bytes in groups.items() if len(replicas) > 1}
        least = 0
        for replicas in groups:
            inside = sum(single.get(replica, 0) for replica in replicas)
            inside += sum(num_bytes for other, num_bytes in shared.items() if other <= replicas)
            ranks = len(self._holders[tuple(sorted(replicas))])
            least = max(least, -(-inside // ranks))
        return least
