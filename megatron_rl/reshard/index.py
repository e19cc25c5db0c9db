"""Finding tensors in a layout: which rectangles of each logical tensor exist, and in which cells.

The index is built per distinct cell, not per rank, and tensors that are cut alike share one `Pattern`, so that its size
and the planner's work grow with the number of different cuts rather than with ranks or layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_rl.reshard.layout import Layout
from megatron_rl.reshard.rectangle import Rectangle, disjoint_parts

MIN_SHARE = 1 << 16
"""Elements. Replicas share the sending of a piece only when every part is at least this large."""

Cells = tuple[Hashable, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """How tensors that are cut alike are cut: disjoint rectangles, and the cells that hold each. Compared by identity;
    an index hands out one object per distinct cut."""

    rectangles: tuple[Rectangle, ...]
    cells: tuple[Cells, ...]
    offsets: tuple[int, ...]  # elements of the pattern before each rectangle

    @property
    def numel(self) -> int:
        return sum(rectangle.numel for rectangle in self.rectangles)


class PatternStore:
    """Hands out one `Pattern` object per distinct cut."""

    def __init__(self) -> None:
        self._known: dict[tuple, Pattern] = {}

    def pattern(self, rectangles: tuple[Rectangle, ...], cells: tuple[Cells, ...]) -> Pattern:
        key = (rectangles, cells)
        if key not in self._known:
            offsets = itertools.accumulate((r.numel for r in rectangles[:-1]), initial=0)
            self._known[key] = Pattern(rectangles, cells, tuple(offsets))
        return self._known[key]


class LayoutIndex:
    """Logical tensor -> `Pattern`, for all tensors of ``layout``, in order of first appearance."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.store = PatternStore()
        self.patterns: dict[str, Pattern] = {}
        self._ranks: dict[Cells, tuple[int, ...]] = {}
        cells = tuple(layout.replicas)
        known: dict[tuple, Pattern] = {}
        for tensor, places in _places(layout, cells).items():
            key = tuple(places)
            if key not in known:
                known[key] = self._pattern(key, cells)
            self.patterns[tensor] = known[key]

    def _pattern(self, places: tuple[tuple[int, ...], ...], cells: Cells) -> Pattern:
        holders: dict[Rectangle, dict[int, None]] = {}
        for cell, *edges in places:
            holders.setdefault(Rectangle(*edges), {})[cell] = None
        parts = disjoint_parts(tuple(holders))
        who = list(holders.values())
        owners = [sorted({cell for i in part.inside for cell in who[i]}) for part in parts]
        return self.store.pattern(
            tuple(part.rectangle for part in parts), tuple(tuple(cells[i] for i in group) for group in owners)
        )

    def ranks(self, cells: Cells) -> tuple[int, ...]:
        """All ranks of ``cells``, ascending."""
        if cells not in self._ranks:
            self._ranks[cells] = tuple(sorted(rank for cell in cells for rank in self.layout.replicas[cell]))
        return self._ranks[cells]


def _places(layout: Layout, cells: Iterable[Hashable]) -> dict[str, list[tuple[int, ...]]]:
    """Tensor -> (cell number, rectangle edges) of each span. Goes past the layout's cache of shards: the index of a
    large layout would otherwise keep millions of spans alive."""
    found: dict[str, list[tuple[int, ...]]] = {}
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    for number, cell in enumerate(cells):
        for shard in layout.emit(cell):
            for span in shard.spans:
                if span.row_start >= span.row_stop or span.col_start >= span.col_stop:
                    continue
                place = (number, span.row_start, span.row_stop, span.col_start, span.col_stop)
                found.setdefault(span.tensor, []).append(shared.setdefault(place, place))
    return found


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
        self._totals: dict[Cells, int] = {}
        for pattern in self.patterns.values():
            for cells, rectangle in zip(pattern.cells, pattern.rectangles, strict=True):
                self._totals[cells] = self._totals.get(cells, 0) + rectangle.numel
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
            (rectangle, cells, share)
            for rectangle, cells in zip(pattern.rectangles, pattern.cells, strict=True)
            for rectangle, share in self._shares(rectangle, cells)
        ]
        if len(pieces) != len(pattern.rectangles):
            pattern = self.store.pattern(tuple(p[0] for p in pieces), tuple(p[1] for p in pieces))
        return SourceTensor(pattern, position, tuple(p[2] for p in pieces))

    def _shares(self, rectangle: Rectangle, cells: Cells) -> Iterator[tuple[Rectangle, int]]:
        """Cut ``rectangle`` between rows where the line of its holders passes from one of them to the next."""
        holders, total, start = len(self.ranks(cells)), self._totals[cells], self._done[cells]
        self._done[cells] = start + rectangle.numel
        first, last = start * holders // total, (start + rectangle.numel - 1) * holders // total
        if first == last or rectangle.numel < self._min_share * (last - first + 1):
            yield rectangle, first
            return
        row = rectangle.row_start
        for share in range(first, last + 1):
            end = -(-total * (share + 1) // holders) - start  # elements of this rectangle up to the end of the share
            stop = min(rectangle.row_stop, rectangle.row_start + -(-end // rectangle.num_cols))
            if stop > row:
                yield rectangle._replace(row_start=row, row_stop=stop), share
                row = stop
