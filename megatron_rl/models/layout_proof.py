"""What a layout does to the rows of a model, proved on intervals: `examine` names every row that is dropped, held
twice, moved or padded.

A layout is compared with a *reference*: the same system's layout on one rank, whose tensors the system itself cuts into
those of its ranks by a rule of its own (`Cut`). So each element of each rank has two addresses, what the layout says
and what the system's cut of the reference says, and both must be one. No weights, no ids and no ranks are needed, and
the work is that of the spans.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from megatron_rl.reshard.layout import Layout, Shard, Span, matrix_shape
from megatron_rl.reshard.rectangle import Rectangle, disjoint_parts, uncovered

DROPPED, DUPLICATED, MOVED, PADDED = "dropped", "duplicated", "moved", "padded"
UNCLAIMED, MISSING, RESHAPED = "unclaimed", "missing", "of another shape"


class Finding(NamedTuple):
    """One thing that a conversion does to a model.

    Attributes:
        kind: one of the words above.
        name: of a tensor of the files, or of one of the system.
        where: rows, and what became of them.
        fault: False for what the system does by design: padding of a vocabulary, for example.
    """

    kind: str
    name: str
    where: str
    fault: bool = True

    def __str__(self) -> str:
        return f"{self.kind}: {self.name} {self.where}"


class Piece(NamedTuple):
    """Rows of a rank's tensor, and where the system's own cut of the reference has them."""

    shard: str  # of the reference
    held: Rectangle  # in the rank's matrix
    row: int  # of the reference's matrix, where it begins
    col: int


Cut = Callable[[Hashable, Shard], Iterable[Piece]]  # of a replica's shard


def examine(
    layout: Layout, reference: Sequence[Shard], logical: Mapping[str, tuple[int, ...]], cut: Cut
) -> Iterator[Finding]:
    """Everything that ``layout`` does to the tensors ``logical`` (name -> shape)."""
    by_name = {shard.name: shard for shard in reference}
    whole = functools.cache(lambda name: _ByRow(by_name[name].spans))
    held: dict[str, set[Rectangle]] = {name: set() for name in logical}
    seen: set[Hashable] = set()
    for replica, ranks in layout.replicas.items():
        mine: dict[str, list[Rectangle]] = {}
        for shard in layout.emit(replica):
            for span in shard.spans:
                if span.tensor in held:
                    held[span.tensor].add(span.rectangle)
                    mine.setdefault(span.tensor, []).append(span.rectangle)
            pieces = tuple(cut(replica, shard))
            if (key := (shard.name, shard.spans, pieces)) not in seen:  # as on another rank
                seen.add(key)
                yield from _inside(layout.name, shard, ranks[0])
                yield from _placed(layout.name, shard, whole, pieces, ranks[0])
        for tensor, rectangles in mine.items():
            yield from _twice(layout.name, tensor, rectangles, f"on rank {ranks[0]}")
    for tensor, found in held.items():
        yield from _covered(layout.name, tensor, logical[tensor], sorted(found))


def rows_text(part: Rectangle) -> str:
    """A rectangle for people: rows, and columns only where they begin behind the first."""
    rows = f"row {part.row_start}" if part.num_rows == 1 else f"rows {part.row_start} to {part.row_stop - 1}"
    return rows + (f", columns {part.col_start} to {part.col_stop - 1}" if part.num_cols > 1 else "")


class _ByRow:
    """Spans of a shard, of which those that meet some rows are found without a look at all others: a tensor of hundreds
    of experts has hundreds."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = sorted(((span.place, span) for span in spans), key=lambda pair: pair[0])
        self._starts = [place.row_start for place, _ in self._spans]
        self._stops = list(itertools.accumulate((place.row_stop for place, _ in self._spans), max))

    def meeting(self, part: Rectangle) -> Iterator[tuple[Rectangle, Span]]:
        """What spans have in common with ``part``, in the shard that they lie in."""
        first = bisect.bisect_right(self._stops, part.row_start)
        last = bisect.bisect_left(self._starts, part.row_stop)
        for place, span in self._spans[first:last]:
            if common := place.intersection(part):
                yield common, span


def _inside(layout: str, shard: Shard, rank: int) -> Iterator[Finding]:
    """Spans that write one place of a shard twice, or go beyond it."""
    rows, cols = shard.matrix_shape
    places = [span.place for span in shard.spans]
    whole = Rectangle(0, rows, 0, cols)
    for span, place in zip(shard.spans, places, strict=True):
        if not whole.contains(place):
            yield Finding(DROPPED, span.tensor, f"{rows_text(span.rectangle)}: outside of {shard.name} on rank {rank}")
    if sum(place.numel for place in places) <= sum(part.rectangle.numel for part in disjoint_parts(_unique(places))):
        return
    for number, first in enumerate(places):
        for second, span in zip(places[:number], shard.spans[:number], strict=True):
            if common := first.intersection(second):
                written = f"{layout}: written over by {shard.spans[number].tensor} in {shard.name} on rank {rank}"
                down, across = common.row_start - span.row, common.col_start - span.col
                lost = common.moved(span.row_start + down, span.col_start + across)
                yield Finding(DROPPED, span.tensor, f"{rows_text(lost)}: {written}")


def _twice(layout: str, tensor: str, rectangles: list[Rectangle], where: str) -> Iterator[Finding]:
    """Elements that one rank holds twice."""
    unique = _unique(rectangles)
    if len(unique) < len(rectangles):
        for one in {r for r in rectangles if rectangles.count(r) > 1}:
            yield Finding(DUPLICATED, tensor, f"{rows_text(one)}: {layout}: held twice {where}")
    for part in disjoint_parts(unique) if len(unique) > 1 else ():
        if len(part.inside) > 1:
            yield Finding(DUPLICATED, tensor, f"{rows_text(part.rectangle)}: {layout}: held twice {where}")


def _covered(layout: str, tensor: str, shape: tuple[int, ...], found: list[Rectangle]) -> Iterator[Finding]:
    """Elements that no rank holds, or that ranks hold in overlapping parts."""
    rows, cols = matrix_shape(shape)
    left: Rectangle | None = Rectangle(0, rows, 0, cols)
    whole, holders = left, list(found)
    while whole and (left := uncovered(whole, holders)):
        yield Finding(DROPPED, tensor, f"{rows_text(left)}: {layout}: no rank holds them")
        holders.append(left)
    yield from _twice(layout, tensor, found, "by ranks that hold different parts")


def _placed(
    layout: str, shard: Shard, reference: Callable[[str], _ByRow], pieces: Iterable[Piece], rank: int
) -> Iterator[Finding]:
    """Elements whose address in the layout is not that of the system's cut of the reference."""
    held = _ByRow(shard.spans)
    for piece in pieces:
        filled = 0
        for place, expected in reference(piece.shard).meeting(piece.held.moved(piece.row, piece.col)):
            filled += place.numel
            here = place.moved(place.row_start - piece.row + piece.held.row_start,
                               place.col_start - piece.col + piece.held.col_start)  # fmt: skip
            wanted = place.moved(expected.row_start + place.row_start - expected.row,
                                 expected.col_start + place.col_start - expected.col)  # fmt: skip
            yield from _differences(layout, shard, held, here, expected.tensor, wanted, rank)
        if padding := piece.held.numel - filled:
            yield from _padding(layout, shard, held, piece, padding, rank)


def _differences(
    layout: str, shard: Shard, held: _ByRow, here: Rectangle, tensor: str, wanted: Rectangle, rank: int
) -> Iterator[Finding]:
    """Where the elements of ``shard`` at ``here`` are not those of ``tensor`` at ``wanted``."""
    filled = 0
    for common, span in held.meeting(here):
        filled += common.numel
        found = common.moved(span.row_start + common.row_start - span.row, span.col_start + common.col_start - span.col)
        right = common.moved(wanted.row_start + common.row_start - here.row_start,
                             wanted.col_start + common.col_start - here.col_start)  # fmt: skip
        if span.tensor != tensor or found != right:
            lies = f"lies where {tensor} {rows_text(right)} belongs, in {shard.name} on rank {rank}"
            yield Finding(MOVED, span.tensor, f"{rows_text(found)}: {layout}: {lies}")
    if filled < here.numel:
        number = f"{here.numel - filled} elements of {rows_text(wanted)}"
        yield Finding(DROPPED, tensor, f"{number}: {layout}: zeros in {shard.name} on rank {rank}")


def _padding(layout: str, shard: Shard, held: _ByRow, piece: Piece, count: int, rank: int) -> Iterator[Finding]:
    """The part of a shard that is padding in the reference, too; nothing of the model may be there."""
    inside = sum(common.numel for common, _ in held.meeting(piece.held))
    expected = piece.held.numel - count
    where = f"{layout}: {count // max(piece.held.num_cols, 1)} rows of zeros on rank {rank}"
    yield Finding(PADDED, shard.name, where, fault=False)
    if inside > expected:
        yield Finding(MOVED, shard.name, f"{layout}: {inside - expected} elements lie in padding on rank {rank}")


def _unique(rectangles: Iterable[Rectangle]) -> tuple[Rectangle, ...]:
    return tuple(dict.fromkeys(rectangles))
