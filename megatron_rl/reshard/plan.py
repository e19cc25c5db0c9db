"""`ReshardPlan`: two layouts laid over one another, and what one rank has to do about it.

A pure function of configuration: each rank computes its own `RankPlan` and both ends of a transfer come to the same
rectangles in the same order without a message. Nothing is moved here; `resharder.py` runs a plan.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_rl.reshard.index import MIN_SHARE, LayoutIndex, Pattern, ReplicaRanks, Replicas, SourceIndex, patterns_of
from megatron_rl.reshard.layout import Layout
from megatron_rl.reshard.offsets import Offset, Offsets
from megatron_rl.reshard.rectangle import Crossing, Rectangle, cross, uncovered
from megatron_rl.reshard.route import Hop, Route
from megatron_rl.reshard.topology import Topology


class Transfer(NamedTuple):
    """One rectangle that goes from one rank to another, seen from one of the two."""

    src_rank: int
    dst_rank: int
    tensor: str  # logical tensor
    rectangle: Rectangle  # of the logical tensor; the same at both ends
    position: int  # orders the transfers between two ranks; the same at both ends
    depth: int  # 0: the sender holds it in a source shard; n: it arrived by n hops, in a target shard
    offset: Offset  # where it sits at this end: in a source shard (sender, depth 0) or a target shard

    @property
    def numel(self) -> int:
        return self.rectangle.numel


class LocalCopy(NamedTuple):
    """One rectangle that is copied inside a rank."""

    tensor: str
    rectangle: Rectangle
    src: Offset
    dst: Offset  # in a target shard


@dataclass(frozen=True)
class RankPlan:
    """One rank's part of a `ReshardPlan`. Sends and receives are sorted by position."""

    rank: int
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    copies: tuple[LocalCopy, ...]  # from source shards to target shards
    duplicates: tuple[LocalCopy, ...]  # between target shards, of what a rank stores twice; after receiving

    @property
    def sent_elements(self) -> int:
        return sum(transfer.numel for transfer in self.sends)

    @property
    def received_elements(self) -> int:
        return sum(transfer.numel for transfer in self.receives)

    @property
    def copied_elements(self) -> int:
        return sum(copy.rectangle.numel for copy in (*self.copies, *self.duplicates))

    @property
    def forwarded_elements(self) -> int:
        return sum(transfer.numel for transfer in self.sends if transfer.depth)

    def __str__(self) -> str:
        sources = len({transfer.src_rank for transfer in self.receives})
        targets = len({transfer.dst_rank for transfer in self.sends})
        return (
            f"rank {self.rank}: copies {self.copied_elements:,} elements locally, receives {self.received_elements:,} "
            f"in {len(self.receives):,} rectangles from {sources} ranks, sends {self.sent_elements:,} in "
            f"{len(self.sends):,} rectangles to {targets} ranks, of which {self.forwarded_elements:,} are passed on"
        )


class ReshardPlan:
    """How the tensors of layout ``source`` become those of layout ``target``.

    Args:
        source: every logical tensor of ``target`` must be covered by it.
        target: its padding (elements under no span) is never written.
        topology: which ranks share a node; None puts all on one.
        min_share: elements; see `index.MIN_SHARE`. Must be equal on all ranks.
    """

    def __init__(
        self, source: Layout, target: Layout, topology: Topology | None = None, min_share: int = MIN_SHARE
    ) -> None:
        self.source, self.target = source, target
        self.topology = topology or Topology()
        self._min_share = min_share
        self._holders, self._needers = ReplicaRanks(source), ReplicaRanks(target)
        self._routes: dict[tuple[Replicas, Replicas], Route] = {}

    @functools.cached_property
    def source_index(self) -> SourceIndex:
        return SourceIndex(self.source, self._min_share)

    @functools.cached_property
    def target_index(self) -> LayoutIndex:
        return LayoutIndex(self.target, writable=True)

    @functools.cached_property
    def ranks(self) -> tuple[int, ...]:
        """All ranks that take part, ascending."""
        return tuple(sorted({*self.source.replica_of, *self.target.replica_of}))

    def route(self, held_by: Replicas, needed_by: Replicas) -> Route:
        key = (held_by, needed_by)
        if key not in self._routes:
            self._routes[key] = Route(self._holders[held_by], self._needers[needed_by], self.topology)
        return self._routes[key]

    def wanted(self, tensors: Iterable[str]) -> Mapping[str, Pattern]:
        """At least the patterns of those of ``tensors`` that the target holds."""
        if self.target.symmetry is None or "target_index" in self.__dict__:
            return self.target_index.patterns
        return patterns_of(self.target, tensors)

    def for_rank(self, rank: int) -> RankPlan:
        """What ``rank`` sends, receives and copies; empty when it takes no part.

        Raises:
            ValueError: the source does not cover a span of one of its target shards, or a shard is malformed.
        """
        with collector_paused():
            return _RankPlanner(self, rank).plan()

    def __str__(self) -> str:
        return (
            f"{self.source.name} on {len(self.source.replica_of)} ranks ({len(self.source.replicas)} different) -> "
            f"{self.target.name} on {len(self.target.replica_of)} ranks ({len(self.target.replicas)} different): "
            f"{len(self.source_index.tensors):,} tensors, {self.source_index.num_elements:,} elements"
        )


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Planning makes millions of records and no cycles: the cyclic collector would double its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _PieceRoute(NamedTuple):
    """What a rank does about one piece of all tensors with the same cuts and senders."""

    rectangle: Rectangle
    before: int  # elements of the tensor before it, in the order of positions
    resident: bool
    hops: tuple[Hop, ...]


class _RankPlanner:
    """The walk over the tensors that one rank holds or needs."""

    def __init__(self, plan: ReshardPlan, rank: int) -> None:
        self._plan, self._rank = plan, rank
        self._held = Offsets(plan.source.shards(rank), f"{plan.source.name}, rank {rank}")
        self._wanted = Offsets(plan.target.shards(rank), f"{plan.target.name}, rank {rank}")
        self._held_replica = _replica_number(plan.source, rank)
        self._wanted_replica = _replica_number(plan.target, rank)
        self._known: dict[tuple[Pattern, Pattern, tuple[int, ...]], list[_PieceRoute]] = {}
        self._sends: list[Transfer] = []
        self._receives: list[Transfer] = []
        self._copies: list[LocalCopy] = []
        self._duplicates: list[LocalCopy] = []

    def plan(self) -> RankPlan:
        tensors = self._plan.source_index.tensors
        mine = dict.fromkeys((*self._held, *self._wanted))
        patterns = self._plan.wanted(mine)
        for tensor in sorted(mine, key=lambda name: tensors[name].position if name in tensors else -1):
            if tensor not in tensors:
                self._refuse(tensor, patterns[tensor].rectangles[0])
            if tensor in patterns:
                self._tensor(tensor, patterns[tensor])
        sends, receives = (tuple(sorted(part, key=_position)) for part in (self._sends, self._receives))
        return RankPlan(self._rank, sends, receives, tuple(self._copies), tuple(self._duplicates))

    def _tensor(self, tensor: str, wanted: Pattern) -> None:
        pattern, start, shares = self._plan.source_index.tensors[tensor]
        key = (pattern, wanted, shares)
        if key not in self._known:
            self._known[key] = list(self._routes(tensor, pattern, wanted, shares))
        for rectangle, before, resident, hops in self._known[key]:
            if resident:
                src, targets = self._held.find(tensor, rectangle)[0], self._wanted.find(tensor, rectangle)
                self._copies += [LocalCopy(tensor, rectangle, src, dst) for dst in targets]
            for hop in hops:
                self._hop(hop, tensor, rectangle, start + before)

    def _routes(self, tensor: str, pattern: Pattern, wanted: Pattern, shares: tuple[int, ...]) -> Iterator[_PieceRoute]:
        for left, right, rectangle in self._crossings(tensor, pattern, wanted):
            route = self._plan.route(pattern.replicas[left], wanted.replicas[right])
            piece = pattern.rectangles[left]
            row, col = rectangle.row_start - piece.row_start, rectangle.col_start - piece.col_start
            before = pattern.starts[left] + row * piece.num_cols + col
            yield _PieceRoute(rectangle, before, self._rank in route.residents, route.hops_of(self._rank, shares[left]))

    def _crossings(self, tensor: str, pattern: Pattern, wanted: Pattern) -> tuple[Crossing, ...]:
        """The crossings that touch this rank, after checking that all it wants is covered."""
        mine = [
            crossing
            for crossing in cross(pattern.rectangles, wanted.rectangles)
            if self._wanted_replica in wanted.replicas[crossing.right]
            or self._held_replica in pattern.replicas[crossing.left]
        ]
        for j, rectangle in enumerate(wanted.rectangles):
            if self._wanted_replica in wanted.replicas[j]:
                covered = sum(crossing.rectangle.numel for crossing in mine if crossing.right == j)
                if covered != rectangle.numel:
                    self._refuse(tensor, uncovered(rectangle, pattern.rectangles) or rectangle)
        return tuple(mine)

    def _hop(self, hop: Hop, tensor: str, rectangle: Rectangle, position: int) -> None:
        sends = hop.src == self._rank
        first, *others = (self._held if sends and not hop.depth else self._wanted).find(tensor, rectangle)
        transfer = Transfer(hop.src, hop.dst, tensor, rectangle, position, hop.depth, first)
        if sends:
            self._sends.append(transfer)
        else:
            self._receives.append(transfer)
            self._duplicates += [LocalCopy(tensor, rectangle, first, other) for other in others]

    def _refuse(self, tensor: str, rectangle: Rectangle) -> None:
        offsets = self._wanted.find(tensor, rectangle)
        shard = offsets[0].shard if offsets else "?"
        raise ValueError(
            f"{self._plan.target.name}: {shard} on rank {self._rank} needs {tensor}{rectangle}, which no rank of "
            f"{self._plan.source.name} holds: check that both layouts describe the same model"
        )


def _position(transfer: Transfer) -> int:
    return transfer.position


def _replica_number(layout: Layout, rank: int) -> int:
    """The number of the rank's replica group in `index.Replicas`; -1 when it takes no part."""
    return tuple(layout.replicas).index(layout.replica_of[rank]) if rank in layout.replica_of else -1
