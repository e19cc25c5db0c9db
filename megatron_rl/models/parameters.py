"""The kinds of parameter a decoder has, each stating how it is laid out in all the systems that hold it.

A kind knows four placements of the same logical (Hugging Face) tensors: the logical tensors themselves, one Megatron
rank's part, one SGLang rank's part, and the in-memory form of `transformers` where that differs from its files.
Components (`models/components`) list their kinds, with the names as arguments; layouts walk the list. Adding a kind is
one class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from megatron_rl.models.naming import MegatronNaming
from megatron_rl.reshard.layout import Shard, Span, block, matrix_shape, stack_rows

Shape = tuple[int, ...]
Piece = tuple[str, int, int]  # logical tensor, first row, row after the last


@dataclass(frozen=True, slots=True)
class Axis:
    """One rank's place on a parallel axis."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where shards are described: prefixes of the names, and the rank's place on each axis."""

    hf: str = ""  # before logical names: "model.layers.7."
    local: str = ""  # before local names: "chunk1.decoder.layers.0."
    tp: Axis = Axis()
    ep: Axis = Axis()
    expert_tp: Axis = Axis()
    padded_vocab: int = 0  # rows of the whole embedding in this system, padding included
    naming: MegatronNaming = field(default_factory=MegatronNaming)


class Parameter(ABC):
    """One or more logical tensors that are placed together in every system."""

    rollout_add = 0.0
    dtype: torch.dtype | None = None  # of files and rollout engines, where it is not the model's
    rollout_dtype: torch.dtype | None = None  # of rollout engines alone

    @abstractmethod
    def logical(self) -> Iterable[tuple[str, Shape]]:
        """Names, without the layer's prefix, and shapes of the logical tensors."""

    @abstractmethod
    def megatron(self, at: Place) -> Iterable[Shard]:
        """What a Megatron rank at this place holds."""

    @abstractmethod
    def rollout(self, at: Place) -> Iterable[Shard]:
        """What an SGLang rank at this place holds (read off sglang 0.5.23's model classes)."""

    def transformers(self, at: Place) -> Iterable[Shard]:
        """What `transformers` holds in memory: the logical tensors, unless a kind says otherwise."""
        for name, shape in self.logical():
            yield whole(at.hf + name, at.hf + name, shape)


def whole(local: str, tensor: str, shape: Shape) -> Shard:
    """A shard that is all of one logical tensor."""
    rows, cols = matrix_shape(shape)
    return Shard(local, shape, (Span(tensor, 0, rows, 0, cols, 0, 0),))


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a logical tensor: all of q_proj, or the query rows of a fused qkv_proj."""

    tensor: str
    start: int
    count: int

    def piece(self, prefix: str, first: int, last: int) -> Piece:
        """Rows ``[first, last)`` of these."""
        return prefix + self.tensor, self.start + first, self.start + last


def logical_rows(parts: Iterable[Rows], cols: int | None) -> list[tuple[str, Shape]]:
    """The logical tensors that ``parts`` make up, ``[rows, cols]``, or ``[rows]`` where ``cols`` is None."""
    counts: dict[str, int] = {}
    for part in parts:
        counts[part.tensor] = max(counts.get(part.tensor, 0), part.start + part.count)
    return [(tensor, row_shape(count, cols)) for tensor, count in counts.items()]


def row_shape(rows: int, cols: int | None) -> Shape:
    """``[rows, cols]``; of a bias, which has no columns, ``[rows]``."""
    return (rows,) if cols is None else (rows, cols)


@dataclass(frozen=True, slots=True)
class Replicated(Parameter):
    """Every rank holds all of it: norms and the router."""

    hf: str
    shape: Shape
    megatron_name: str
    fused_name: str = ""  # Megatron's name where TransformerEngine fuses the norm into the linear layer behind it
    transformers_name: str = ""  # in memory, where it differs from the file's
    rollout_add: float = 0.0  # added to the file's values in the rollout engine
    dtype: torch.dtype | None = None
    rollout_dtype: torch.dtype | None = None

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return [(self.hf, self.shape)]

    def megatron(self, at: Place) -> Iterable[Shard]:
        fused = at.naming.fused_norms and self.fused_name
        return [whole(at.local + (self.fused_name if fused else self.megatron_name), at.hf + self.hf, self.shape)]

    def rollout(self, at: Place) -> Iterable[Shard]:
        return [whole(at.local + self.hf, at.hf + self.hf, self.shape)]

    def transformers(self, at: Place) -> Iterable[Shard]:
        return [whole(at.hf + (self.transformers_name or self.hf), at.hf + self.hf, self.shape)]


@dataclass(frozen=True, slots=True)
class VocabularyRows(Parameter):
    """The embedding or the output layer: blocks of rows of a padded vocabulary; padding rows come last and are zero."""

    hf: str
    vocab: int
    hidden: int
    megatron_name: str
    rollout_name: str
    whole_in_rollout: bool = False  # every rank of a rollout engine has all rows, without padding

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return [(self.hf, (self.vocab, self.hidden))]

    def megatron(self, at: Place) -> Iterable[Shard]:
        return [self._rows(at, self.megatron_name)]

    def rollout(self, at: Place) -> Iterable[Shard]:
        if self.whole_in_rollout:
            return [whole(at.local + self.rollout_name, at.hf + self.hf, (self.vocab, self.hidden))]
        return [self._rows(at, self.rollout_name)]

    def _rows(self, at: Place, name: str) -> Shard:
        start, stop = block(at.padded_vocab, at.tp.index, at.tp.count, "the padded vocabulary")
        real = [(at.hf + self.hf, start, min(stop, self.vocab))] if start < self.vocab else []
        return Shard(at.local + name, (stop - start, self.hidden), stack_rows(real, self.hidden))


@dataclass(frozen=True, slots=True)
class FusedQKV(Parameter):
    """q/k/v_proj, weight or bias, in one tensor.

    Megatron interleaves by query group, ``[q heads of the group | k head | v head]`` group after group
    (megatron.core Attention.get_query_key_value_tensors), and cuts that into equal blocks of rows: with more tensor
    parallel ranks than groups a block is part of a group. SGLang stacks ``[all q | all k | all v]`` of the rank's
    heads (QKVParallelLinear) and repeats key/value heads when there are more ranks than such heads.
    """

    q: Rows
    k: Rows
    v: Rows
    head_dim: int
    cols: int | None  # of the weight; None = the bias
    megatron_name: str
    rollout_name: str

    def _shard(self, name: str, pieces: Iterable[Piece]) -> Shard:
        pieces = list(pieces)
        rows = sum(stop - start for _, start, stop in pieces)
        return Shard(name, row_shape(rows, self.cols), stack_rows(pieces, self.cols or 1))

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return logical_rows((self.q, self.k, self.v), self.cols)

    def megatron(self, at: Place) -> Iterable[Shard]:
        rows = self.q.count + self.k.count + self.v.count
        start, stop = block(rows, at.tp.index, at.tp.count, "fused query, key and value rows")
        return [self._shard(at.local + self.megatron_name, window(self._groups(at.hf), start, stop))]

    def _groups(self, prefix: str) -> Iterator[Piece]:
        dim, num_groups = self.head_dim, self.k.count // self.head_dim
        per_group = self.q.count // num_groups
        for group in range(num_groups):
            yield self.q.piece(prefix, group * per_group, (group + 1) * per_group)
            yield self.k.piece(prefix, group * dim, (group + 1) * dim)
            yield self.v.piece(prefix, group * dim, (group + 1) * dim)

    def rollout(self, at: Place) -> Iterable[Shard]:
        dim, tp, num_groups = self.head_dim, at.tp, self.k.count // self.head_dim
        q_rows = block(self.q.count, tp.index, tp.count, "query rows")
        if num_groups >= tp.count:
            kv_rows = block(self.k.count, tp.index, tp.count, "key and value rows")
        else:
            head = tp.index * num_groups // tp.count
            kv_rows = (head * dim, (head + 1) * dim)
        rows = ((self.q, q_rows), (self.k, kv_rows), (self.v, kv_rows))
        return [self._shard(at.local + self.rollout_name, (part.piece(at.hf, *block) for part, block in rows))]


def window(pieces: Iterable[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The part of ``pieces``, laid below one another, that falls in rows ``[start, stop)``."""
    row = 0
    for tensor, first, last in pieces:
        low, high = max(start, row), min(stop, row + last - first)
        if low < high:
            yield tensor, first + low - row, first + high - row
        row += last - first


@dataclass(frozen=True, slots=True)
class GateUp(Parameter):
    """gate_proj and up_proj in one tensor: a rank holds ``[its gate rows ; its up rows]`` in both systems."""

    gate: Rows
    up: Rows
    cols: int | None  # of the weight; None = the bias
    megatron_name: str
    rollout_name: str

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return logical_rows((self.gate, self.up), self.cols)

    def megatron(self, at: Place) -> Iterable[Shard]:
        return [self._halves(at, self.megatron_name)]

    def rollout(self, at: Place) -> Iterable[Shard]:
        return [self._halves(at, self.rollout_name)]

    def _halves(self, at: Place, name: str) -> Shard:
        start, stop = block(self.gate.count, at.tp.index, at.tp.count, "the feed-forward size")
        pieces = [half.piece(at.hf, start, stop) for half in (self.gate, self.up)]
        return Shard(at.local + name, row_shape(2 * (stop - start), self.cols), stack_rows(pieces, self.cols or 1))


@dataclass(frozen=True, slots=True)
class InputColumns(Parameter):
    """A row-parallel linear layer (o_proj, down_proj): a rank holds a block of columns."""

    hf: str
    hidden: int
    inputs: int
    megatron_name: str

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return [(self.hf, (self.hidden, self.inputs))]

    def megatron(self, at: Place) -> Iterable[Shard]:
        return [self._columns(at, self.megatron_name)]

    def rollout(self, at: Place) -> Iterable[Shard]:
        return [self._columns(at, self.hf)]

    def _columns(self, at: Place, name: str) -> Shard:
        start, stop = block(self.inputs, at.tp.index, at.tp.count, f"the inputs of {self.hf}")
        span = Span(at.hf + self.hf, 0, self.hidden, start, stop, 0, 0)
        return Shard(at.local + name, (self.hidden, stop - start), (span,))
