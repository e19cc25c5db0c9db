"""Layouts as data: which part of which logical tensor sits where, on every rank.

A *logical tensor* is one Hugging Face parameter (``model.layers.0.self_attn.q_proj.weight``). Every tensor, logical or
local, is seen as a row-major matrix: ``[n]`` as ``[n, 1]``, ``[a, b, c]`` as ``[a * b, c]``. A `Span` places one
rectangle of a logical tensor into one local tensor (a `Shard`). Two layouts of the same logical tensors meet by
intersecting rectangles, so no layout ever needs to know the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_rl.reshard.rectangle import Rectangle
from megatron_rl.reshard.wire_format import WireFormat


@dataclass(frozen=True, slots=True)
class Span:
    """Rows ``[row_start, row_stop)`` and columns ``[col_start, col_stop)`` of logical ``tensor`` sit in the shard's
    matrix with their upper left corner at ``(row, col)``. Units: elements."""

    tensor: str
    row_start: int
    row_stop: int
    col_start: int
    col_stop: int
    row: int
    col: int

    @property
    def num_rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def num_cols(self) -> int:
        return self.col_stop - self.col_start

    @property
    def numel(self) -> int:
        return self.num_rows * self.num_cols

    @property
    def rectangle(self) -> Rectangle:
        """What it holds of the logical tensor."""
        return Rectangle(self.row_start, self.row_stop, self.col_start, self.col_stop)

    @property
    def place(self) -> Rectangle:
        """Where that sits in the shard's matrix."""
        return Rectangle(self.row, self.row + self.num_rows, self.col, self.col + self.num_cols)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's local tensor: its name in that system, its shape, and the spans that fill it. Elements that no span
    covers are padding and hold zeros."""

    name: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]
    like: str = ""  # the logical tensor whose dtype a shard of nothing but padding has; "" = that of most

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return matrix_shape(self.shape)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """How a tensor of ``shape`` is seen as a matrix: the last dim is the columns, except that ``[n]`` is ``[n, 1]``."""
    if len(shape) < 2:
        return (math.prod(shape), 1)
    return (math.prod(shape[:-1]), shape[-1])


@dataclass(frozen=True, slots=True)
class Held:
    """How a system stores a logical tensor whose values it does not store unchanged.

    Args:
        add: constant added to the logical values: 1.0 for norms that are stored as ``1 + weight``.
        dtype: of its values; None = that of most tensors there.
    """

    add: float = 0.0
    dtype: torch.dtype | None = None


AS_IT_IS = Held()


@dataclass(frozen=True)
class Recomputed:
    """A tensor that each rank of a system computes from one of its shards, and must compute again once that was
    written: the two halves into which SGLang cuts kv_b_proj of latent attention are such tensors.

    Args:
        name: that system's.
        source: name of the shard.
        compute: values of the shard -> values of this tensor, to know whether the system did.
        by_loader: only the system's own loader computes it, while it reads the source; nothing does afterwards.
    """

    name: str
    source: str
    compute: Callable[[Tensor], Tensor]
    by_loader: bool = False


@dataclass(frozen=True)
class Symmetry:
    """The symmetry of a layout.

    Args:
        kind: logical tensor -> its kind. Each replica group holds the same rectangles of all tensors of one kind (an
            expert's down_proj in every layer, say); shard names and offsets inside shards may differ.
        emit_some: (replica group, tensors) -> those of its shards that hold one of ``tensors``, and possibly others.
    """

    kind: Callable[[str], Hashable]
    emit_some: Callable[[Hashable, Collection[str]], Iterable[Shard]]


@dataclass(frozen=True)
class Layout:
    """Who holds what. Ranks of one *replica group* (those with the same (tp, pp) coordinates, say) hold equal shards.
    A pure function of configuration: no rank needs to ask another.

    Args:
        name: for people, "megatron TP2 PP2".
        replica_of: global rank -> the key of its replica group, for every rank that takes part.
        emit: replica group -> the shards of each of its ranks.
        symmetry: lets the planner of a large model look at a few tensors only; None makes it look at all.
        held: logical tensor -> how this system holds its values; those that are not listed unchanged.
        recomputed: what the system computes from its shards, and keeps.
    """

    name: str
    replica_of: Mapping[int, Hashable]
    emit: Callable[[Hashable], Iterable[Shard]]
    symmetry: Symmetry | None = None
    held: Mapping[str, Held] = field(default_factory=dict)
    recomputed: tuple[Recomputed, ...] = ()

    def added(self, tensor: str) -> float:
        """The constant that this system adds to the values of logical ``tensor``."""
        return self.held.get(tensor, AS_IT_IS).add

    def dtypes(self, most: torch.dtype) -> WireFormat:
        """What this system holds each logical tensor in, ``most`` of them alike."""
        return WireFormat(most, {tensor: held.dtype for tensor, held in self.held.items() if held.dtype is not None})

    def shards(self, rank: int) -> tuple[Shard, ...]:
        """The shards of ``rank``; empty when the rank takes no part."""
        return self.shards_of(self.replica_of[rank]) if rank in self.replica_of else ()

    def shards_of(self, replica: Hashable) -> tuple[Shard, ...]:
        return self._emitted(replica)

    @functools.cached_property
    def _emitted(self) -> Callable[[Hashable], tuple[Shard, ...]]:
        return functools.cache(lambda replica: tuple(self.emit(replica)))

    @functools.cached_property
    def replicas(self) -> dict[Hashable, tuple[int, ...]]:
        """Replica group -> the ranks in it, ascending."""
        groups: dict[Hashable, list[int]] = {}
        for rank in sorted(self.replica_of):
            groups.setdefault(self.replica_of[rank], []).append(rank)
        return {replica: tuple(ranks) for replica, ranks in groups.items()}


def restricted(layout: Layout, tensors: Collection[str]) -> Layout:
    """``layout`` with only the spans of ``tensors``: a plan for a part of a model need not walk all of it."""

    def emit(replica: Hashable) -> Iterator[Shard]:
        for shard in layout.shards_of(replica):
            spans = tuple(span for span in shard.spans if span.tensor in tensors)
            if spans:
                yield replace(shard, spans=spans)

    return Layout(layout.name, layout.replica_of, emit, held=layout.held)


def block(size: int, index: int, count: int, what: str = "dimension") -> tuple[int, int]:
    """``[start, stop)`` of the ``index``-th of ``count`` equal blocks.

    Raises:
        ValueError: ``size`` is not divisible by ``count``.
    """
    if size % count:
        raise ValueError(f"{what} of {size} cannot be split over {count} ranks: choose a divisor of {size}")
    return index * size // count, (index + 1) * size // count


def stack_rows(pieces: Iterable[tuple[str, int, int]], num_cols: int, row: int = 0) -> tuple[Span, ...]:
    """Lay full-width row ranges ``(tensor, start, stop)`` below one another, beginning at local ``row``."""
    spans = []
    for tensor, start, stop in pieces:
        spans.append(Span(tensor, start, stop, 0, num_cols, row, 0))
        row += stop - start
    return tuple(spans)
