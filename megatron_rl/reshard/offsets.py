"""Where logical rectangles sit in one rank's local tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megatron_rl.reshard.layout import Shard
from megatron_rl.reshard.rectangle import Rectangle, disjoint_parts


class Offset(NamedTuple):
    """The upper left corner of a rectangle, in the matrix of one local tensor. Units: elements."""

    shard: str
    row: int
    col: int


class Offsets:
    """Logical tensor -> the places of its spans in the local tensors ``shards``.

    Raises:
        ValueError: a span leaves its shard's matrix, or two spans of a shard overlap; ``whose`` begins the message.
    """

    def __init__(self, shards: Iterable[Shard], whose: str) -> None:
        self._places: dict[str, list[tuple[Rectangle, Offset]]] = {}
        self.numel = 0
        for shard in shards:
            check_shard(shard, whose)
            for span in shard.spans:
                self.numel += span.numel
                if span.numel:
                    offset = Offset(shard.name, span.row, span.col)
                    self._places.setdefault(span.tensor, []).append((span.rectangle, offset))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def find(self, tensor: str, wanted: Rectangle) -> list[Offset]:
        """Every place of ``wanted``, a rectangle that lies inside at least one span of ``tensor``."""
        places = self._places.get(tensor, ())
        if len(places) == 1 and places[0][0] == wanted:
            return [places[0][1]]
        return [
            Offset(shard, row + wanted.row_start - held.row_start, col + wanted.col_start - held.col_start)
            for held, (shard, row, col) in places
            if held.contains(wanted)
        ]


def check_shard(shard: Shard, whose: str) -> None:
    """Raise ValueError unless the spans lie inside the shard and are disjoint: then no element is written twice."""
    placed = tuple(Rectangle(s.row, s.row + s.num_rows, s.col, s.col + s.num_cols) for s in shard.spans)
    fault = _fault(shard.matrix_shape, placed)
    if fault is not None:
        number, reason = fault
        raise ValueError(f"{whose}: {reason} of {shard.name} {list(shard.shape)}: {shard.spans[number]}")


@functools.lru_cache(maxsize=4096)
def _fault(shape: tuple[int, int], placed: tuple[Rectangle, ...]) -> tuple[int, str] | None:
    whole = Rectangle(0, shape[0], 0, shape[1])
    for i, rectangle in enumerate(placed):
        if rectangle.num_rows < 0 or rectangle.num_cols < 0 or not whole.contains(rectangle):
            return i, "a span leaves the matrix"
    real = [rectangle for rectangle in placed if rectangle.numel]
    if len(set(real)) == len(real):
        shared = [part.inside for part in disjoint_parts(tuple(real)) if len(part.inside) > 1]
        if not shared:
            return None
        return placed.index(real[shared[0][1]]), "two spans overlap in the matrix"
    return next(i for i, r in enumerate(placed) if r.numel and r in placed[:i]), "two spans overlap in the matrix"
