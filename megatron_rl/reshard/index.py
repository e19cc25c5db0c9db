"""Finding tensors in a layout: which rectangles of each logical tensor exist, and in which replica groups.

The index is built per replica group, not per rank, and tensors that are cut alike share one `Pattern`, so that its size
and the planner's work grow with the number of different cuts rather than with ranks or layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_rl.reshard.layout import Layout, Shard
from megatron_rl.reshard.offsets import check_shard
from megatron_rl.reshard.rectangle import Rectangle, disjoint_parts

MIN_SHARE = 1 << 16
"""Elements. Replicas share the sending of a piece only when every part is at least this large."""

Replicas = tuple[int, ...]
"""Numbers of replica groups, in the order of `Layout.replicas`, ascending: cheaper to compare than their keys."""

Places = dict[str, list[tuple[int, ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """How equally cut tensors are cut: disjoint rectangles, and the replica groups that hold each. Compared by
    identity; an index hands out one object per distinct cut."""

    rectangles: tuple[Rectangle, ...]
    replicas: tuple[Replicas, ...]
    sizes: tuple[int, ...]  # elements of each rectangle
    starts: tuple[int, ...]  # elements of the pattern before each rectangle
    numel: int


class PatternStore:
    """Hands out one `Pattern` object per distinct cut."""

    def __init__(self) -> None:
        self._known: dict[tuple, Pattern] = {}

    def pattern(self, rectangles: tuple[Rectangle, ...], replicas: tuple[Replicas, ...]) -> Pattern:
        key = (rectangles, replicas)
        if key not in self._known:
            sizes = tuple(rectangle.numel for rectangle in rectangles)
            *starts, numel = itertools.accumulate(sizes, initial=0)
            self._known[key] = Pattern(rectangles, replicas, sizes, tuple(starts), numel)
        return self._known[key]


class ReplicaRanks:
    """The ranks of any set of replica groups of a layout, ascending."""

    def __init__(self, layout: Layout) -> None:
        self._replicas = tuple(layout.replicas.values())
        self._known: dict[Replicas, tuple[int, ...]] = {}

    def __getitem__(self, replicas: Replicas) -> tuple[int, ...]:
        if replicas not in self._known:
            self._known[replicas] = tuple(sorted(rank for replica in replicas for rank in self._replicas[replica]))
        return self._known[replicas]


class LayoutIndex:
    """Logical tensor -> `Pattern`, in order of first appearance.

    Args:
        only: index these tensors alone, which costs less than all where the layout has a `Symmetry`.
        writable: also check that no element of a shard lies under two spans (`offsets.check_shard`).
    """

    def __init__(self, layout: Layout, only: Collection[str] | None = None, writable: bool = False) -> None:
        self.store = PatternStore()
        self.patterns: dict[str, Pattern] = {}
        self.num_stored = 0  # elements under the spans of all ranks, repetitions included
        known: dict[tuple, Pattern] = {}
        for tensor, places in self._places(layout, only, writable).items():
            key = tuple(places)
            if key not in known:
                known[key] = self._pattern(key)
            self.patterns[tensor] = known[key]

    def _places(self, layout: Layout, only: Collection[str] | None, writable: bool) -> Places:
        """Tensor -> (number of the replica group, rectangle edges) of each span. Does not use the layout's cache of
        shards: the index of a large layout would otherwise keep millions of spans alive."""
        found: Places = {}
        shared: dict[tuple[int, ...], tuple[int, ...]] = {}
        for number, (replica, ranks) in enumerate(layout.replicas.items()):
            for shard in _emitted(layout, replica, only):
                if writable:
                    check_shard(shard, f"{layout.name}, rank {ranks[0]}")
                for span in shard.spans:
                    top, bottom, left, right = span.row_start, span.row_stop, span.col_start, span.col_stop
                    if top < bottom and left < right:
                        place = (number, top, bottom, left, right)
                        found.setdefault(span.tensor, []).append(shared.setdefault(place, place))
                        self.num_stored += (bottom - top) * (right - left) * len(ranks)
        return found if only is None else {tensor: found[tensor] for tensor in found if tensor in only}

    def _pattern(self, places: tuple[tuple[int, ...], ...]) -> Pattern:
        holders: dict[Rectangle, dict[int, None]] = {}
        for replica, *edges in places:
            holders.setdefault(Rectangle(*edges), {})[replica] = None
        parts = disjoint_parts(tuple(holders))
        who = list(holders.values())
        owners = tuple(tuple(sorted({replica for i in part.inside for replica in who[i]})) for part in parts)
        return self.store.pattern(tuple(part.rectangle for part in parts), owners)


def patterns_of(layout: Layout, tensors: Iterable[str]) -> dict[str, Pattern]:
    """The patterns of those of ``tensors`` that ``layout`` holds; one of each kind is looked at."""
    assert layout.symmetry is not None
    kinds = {tensor: layout.symmetry.kind(tensor) for tensor in tensors}
    samples: dict[Hashable, str] = {}
    for tensor, kind in kinds.items():
        samples.setdefault(kind, tensor)
    found = LayoutIndex(layout, frozenset(samples.values())).patterns
    return {tensor: found[samples[kind]] for tensor, kind in kinds.items() if samples[kind] in found}


def _emitted(layout: Layout, replica: Hashable, only: Collection[str] | None) -> Iterable[Shard]:
    if only is None or layout.symmetry is None:
        return layout.emit(replica)
    return layout.symmetry.emit_some(replica, only)


class SourceTensor(NamedTuple):
    """Where a logical tensor comes from."""

    pattern: Pattern
    position: int  # elements of the whole model before this tensor: orders all traffic
    shares: tuple[int, ...]  # per rectangle: which of its holders, as a number in [0, holders), sends it


class SourceIndex(LayoutIndex):
    """`LayoutIndex` that also divides the sending evenly: all pieces held by the same ranks are laid on one line, and
    each of the N ranks sends one Nth of it. Both ends of a transfer can compute this without asking.

    Args:
        min_share: see `MIN_SHARE`.
    """

    def __init__(self, layout: Layout, min_share: int = MIN_SHARE) -> None:
        super().__init__(layout)
        self._ranks = ReplicaRanks(layout)
        self._totals: dict[Replicas, int] = {}
        for pattern in self.patterns.values():
            for replicas, size in zip(pattern.replicas, pattern.sizes, strict=True):
                self._totals[replicas] = self._totals.get(replicas, 0) + size
        self._done = dict.fromkeys(self._totals, 0)
        self._min_share = max(min_share, 1)
        self.tensors: dict[str, SourceTensor] = {}
        position = 0
        for tensor, pattern in self.patterns.items():
            self.tensors[tensor] = self._shared(pattern, position)
            position += pattern.numel
        self.num_elements = position

    def _shared(self, pattern: Pattern, position: int) -> SourceTensor:
        pieces = [
            (piece, replicas, share)
            for rectangle, size, replicas in zip(pattern.rectangles, pattern.sizes, pattern.replicas, strict=True)
            for piece, share in self._shares(rectangle, size, replicas)
        ]
        if len(pieces) != len(pattern.rectangles):
            pattern = self.store.pattern(tuple(p[0] for p in pieces), tuple(p[1] for p in pieces))
        return SourceTensor(pattern, position, tuple(p[2] for p in pieces))

    def _shares(self, rectangle: Rectangle, size: int, replicas: Replicas) -> Iterator[tuple[Rectangle, int]]:
        """Cut ``rectangle`` between rows where the line of its holders passes from one of them to the next."""
        holders, total, start = len(self._ranks[replicas]), self._totals[replicas], self._done[replicas]
        self._done[replicas] = start + size
        first, last = start * holders // total, (start + size - 1) * holders // total
        if first == last or size < self._min_share * (last - first + 1):
            yield rectangle, first
            return
        row = rectangle.row_start
        for share in range(first, last + 1):
            end = -(-total * (share + 1) // holders) - start  # elements of this rectangle up to the end of the share
            stop = min(rectangle.row_stop, rectangle.row_start + -(-end // rectangle.num_cols))
            if stop > row:
                yield rectangle._replace(row_start=row, row_stop=stop), share
                row = stop
