"""Arithmetic of rectangles of a matrix: the only mathematics under a plan.

A layout cuts logical tensors into rectangles; a plan is what remains when two such cuts are laid over one another.
Both operations here depend on the rectangles alone, never on tensor names, so that thousands of tensors which are cut
alike share one cached result.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Rectangle(NamedTuple):
    """Rows ``[row_start, row_stop)`` and columns ``[col_start, col_stop)`` of one logical tensor."""

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int

    @property
    def num_rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def num_cols(self) -> int:
        return self.col_stop - self.col_start

    @property
    def numel(self) -> int:
        return (self.row_stop - self.row_start) * (self.col_stop - self.col_start)

    @property
    def slices(self) -> tuple[slice, slice]:
        """``matrix[rectangle.slices]`` is this part of a matrix."""
        return slice(self.row_start, self.row_stop), slice(self.col_start, self.col_stop)

    def contains(self, other: Rectangle) -> bool:
        return (
            self.row_start <= other.row_start
            and other.row_stop <= self.row_stop
            and self.col_start <= other.col_start
            and other.col_stop <= self.col_stop
        )

    def intersection(self, other: Rectangle) -> Rectangle | None:
        """The elements of both; None where there are none. `cross` does the same for many at once."""
        top, bottom = max(self.row_start, other.row_start), min(self.row_stop, other.row_stop)
        left, right = max(self.col_start, other.col_start), min(self.col_stop, other.col_stop)
        return Rectangle(top, bottom, left, right) if top < bottom and left < right else None

    def moved(self, row: int, col: int) -> Rectangle:
        """One of equal size whose upper left corner is ``(row, col)``."""
        return Rectangle(row, row + self.num_rows, col, col + self.num_cols)

    def __str__(self) -> str:
        return f"[{self.row_start}:{self.row_stop}, {self.col_start}:{self.col_stop}]"


class DisjointPart(NamedTuple):
    """A rectangle that lies wholly inside each of the rectangles ``inside`` (their indices) and outside all others."""

    rectangle: Rectangle
    inside: tuple[int, ...]


class Crossing(NamedTuple):
    """Where rectangle ``left`` of one cut meets rectangle ``right`` of another (indices)."""

    left: int
    right: int
    rectangle: Rectangle


@functools.lru_cache(maxsize=4096)
def disjoint_parts(rectangles: tuple[Rectangle, ...]) -> tuple[DisjointPart, ...]:
    """Cut distinct, possibly overlapping rectangles into disjoint parts that cover the same elements."""
    if not rectangles:
        return ()
    rows, cols = _cuts(rectangles)
    count = np.zeros((len(rows) - 1, len(cols) - 1), np.int32)
    for window in _windows(rectangles, rows, cols):
        count[window] += 1
    if count.size == 0 or count.max() <= 1:
        return tuple(DisjointPart(rectangle, (i,)) for i, rectangle in enumerate(rectangles))
    inside = np.empty(count.shape, object)
    inside.fill(())
    for i, window in enumerate(_windows(rectangles, rows, cols)):
        block = inside[window]
        for at in np.ndindex(block.shape):
            block[at] = (*block[at], i)
    return tuple(_merged(inside, rows, cols))


def _merged(inside: np.ndarray, rows: list[int], cols: list[int]) -> Iterable[DisjointPart]:
    """Join neighbouring grid cells that lie in the same rectangles: along columns first, then equal runs down rows."""
    open_runs: dict[tuple[int, int, tuple[int, ...]], int] = {}
    for y in range(len(rows)):
        runs = set(_runs(inside[y], cols)) if y < len(inside) else set()
        for run in [run for run in open_runs if run not in runs]:
            col_start, col_stop, owners = run
            yield DisjointPart(Rectangle(open_runs.pop(run), rows[y], col_start, col_stop), owners)
        for run in sorted(runs):
            open_runs.setdefault(run, rows[y])


def _runs(line: np.ndarray, cols: list[int]) -> Iterable[tuple[int, int, tuple[int, ...]]]:
    start = 0
    for x in range(1, len(line) + 1):
        if x == len(line) or line[x] != line[start]:
            if line[start]:
                yield cols[start], cols[x], line[start]
            start = x


def _cuts(rectangles: Iterable[Rectangle]) -> tuple[list[int], list[int]]:
    rows = {edge for r in rectangles for edge in (r.row_start, r.row_stop)}
    cols = {edge for r in rectangles for edge in (r.col_start, r.col_stop)}
    return sorted(rows), sorted(cols)


def _windows(rectangles: Iterable[Rectangle], rows: list[int], cols: list[int]) -> Iterable[tuple[slice, slice]]:
    row_at, col_at = {edge: i for i, edge in enumerate(rows)}, {edge: i for i, edge in enumerate(cols)}
    for r in rectangles:
        yield slice(row_at[r.row_start], row_at[r.row_stop]), slice(col_at[r.col_start], col_at[r.col_stop])


@functools.lru_cache(maxsize=16384)
def cross(left: tuple[Rectangle, ...], right: tuple[Rectangle, ...]) -> tuple[Crossing, ...]:
    """All non-empty intersections of two cuts, in order of (left, right)."""
    if not left or not right:
        return ()
    a, b = np.asarray(left, np.int64)[:, None], np.asarray(right, np.int64)[None, :]
    low, high = np.maximum(a[..., 0::2], b[..., 0::2]), np.minimum(a[..., 1::2], b[..., 1::2])
    pairs = np.argwhere((low < high).all(-1))
    edges = np.stack([low[..., 0], high[..., 0], low[..., 1], high[..., 1]], -1)[pairs[:, 0], pairs[:, 1]]
    return tuple(Crossing(i, j, Rectangle(*edge)) for (i, j), edge in zip(pairs.tolist(), edges.tolist(), strict=True))


def uncovered(wanted: Rectangle, holders: Iterable[Rectangle]) -> Rectangle | None:
    """A part of ``wanted`` outside every holder, or None when they cover it."""
    met = [crossing.rectangle for crossing in cross((wanted,), tuple(holders))]
    for part in disjoint_parts((wanted, *dict.fromkeys(r for r in met if r != wanted))):
        if part.inside == (0,) and wanted not in met:
            return part.rectangle
    return None
