"""The kinds of parameter a decoder has, each stating how it is laid out in all the systems that hold it.

A kind knows four placements of the same logical (Hugging Face) tensors: the logical tensors themselves, one Megatron
rank's part, one SGLang rank's part, and the in-memory form of `transformers` where that differs from its files.
Families (`models/family.py`) list the kinds of each layer; layouts walk the list. Adding a kind is one class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_rl.models.naming import MegatronNaming
from megatron_rl.reshard.layout import Shard, Span, block, stack_rows

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
    """One or more logical tensors that every system places together."""

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
    """A shard that is all of one logical tensor of at most two dims."""
    rows, cols = shape[0], shape[1] if len(shape) == 2 else 1
    return Shard(local, shape, (Span(tensor, 0, rows, 0, cols, 0, 0),))


@dataclass(frozen=True, slots=True)
class Replicated(Parameter):
    """Every rank holds all of it: norms and the router."""

    hf: str
    shape: Shape
    megatron_name: str
    fused_name: str = ""  # its name where TransformerEngine fuses the norm into the linear layer behind it

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return [(self.hf, self.shape)]

    def megatron(self, at: Place) -> Iterable[Shard]:
        fused = at.naming.fused_norms and self.fused_name
        return [whole(at.local + (self.fused_name if fused else self.megatron_name), at.hf + self.hf, self.shape)]

    def rollout(self, at: Place) -> Iterable[Shard]:
        return [whole(at.local + self.hf, at.hf + self.hf, self.shape)]


@dataclass(frozen=True, slots=True)
class VocabularyRows(Parameter):
    """The embedding or the output layer: blocks of rows of a padded vocabulary; padding rows come last and are zero."""

    hf: str
    vocab: int
    hidden: int
    megatron_name: str
    rollout_name: str

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return [(self.hf, (self.vocab, self.hidden))]

    def megatron(self, at: Place) -> Iterable[Shard]:
        return [self._rows(at, self.megatron_name)]

    def rollout(self, at: Place) -> Iterable[Shard]:
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

    suffix: str  # "weight" or "bias"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int

    @property
    def _cols(self) -> int:
        return self.hidden if self.suffix == "weight" else 1

    def _shape(self, rows: int) -> Shape:
        return (rows, self.hidden) if self.suffix == "weight" else (rows,)

    def _name(self, letter: str) -> str:
        return f"self_attn.{letter}_proj.{self.suffix}"

    def logical(self) -> Iterable[tuple[str, Shape]]:
        heads = (("q", self.num_heads), ("k", self.num_kv_heads), ("v", self.num_kv_heads))
        return [(self._name(letter), self._shape(count * self.head_dim)) for letter, count in heads]

    def megatron(self, at: Place) -> Iterable[Shard]:
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        start, stop = block(rows, at.tp.index, at.tp.count, "fused query, key and value rows")
        pieces = window(self._groups(at.hf), start, stop)
        name = f"{at.local}self_attention.linear_qkv.{self.suffix}"
        return [Shard(name, self._shape(stop - start), stack_rows(pieces, self._cols))]

    def _groups(self, prefix: str) -> Iterator[Piece]:
        dim, per_group = self.head_dim, self.num_heads // self.num_kv_heads
        q, k, v = (prefix + self._name(letter) for letter in "qkv")
        for group in range(self.num_kv_heads):
            yield q, group * per_group * dim, (group + 1) * per_group * dim
            yield k, group * dim, (group + 1) * dim
            yield v, group * dim, (group + 1) * dim

    def rollout(self, at: Place) -> Iterable[Shard]:
        dim, tp = self.head_dim, at.tp
        q_rows = block(self.num_heads * dim, tp.index, tp.count, "query rows")
        if self.num_kv_heads >= tp.count:
            kv_rows = block(self.num_kv_heads * dim, tp.index, tp.count, "key and value rows")
        else:
            head = tp.index * self.num_kv_heads // tp.count
            kv_rows = (head * dim, (head + 1) * dim)
        q, k, v = (at.hf + self._name(letter) for letter in "qkv")
        pieces = [(q, *q_rows), (k, *kv_rows), (v, *kv_rows)]
        rows = sum(stop - start for _, start, stop in pieces)
        name = f"{at.local}self_attn.qkv_proj.{self.suffix}"
        return [Shard(name, self._shape(rows), stack_rows(pieces, self._cols))]


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

    ffn: int
    hidden: int

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return [(f"mlp.{name}_proj.weight", (self.ffn, self.hidden)) for name in ("gate", "up")]

    def megatron(self, at: Place) -> Iterable[Shard]:
        return [self._halves(at, "mlp.linear_fc1.weight")]

    def rollout(self, at: Place) -> Iterable[Shard]:
        return [self._halves(at, "mlp.gate_up_proj.weight")]

    def _halves(self, at: Place, name: str) -> Shard:
        start, stop = block(self.ffn, at.tp.index, at.tp.count, "the feed-forward size")
        pieces = [(f"{at.hf}mlp.{half}_proj.weight", start, stop) for half in ("gate", "up")]
        return Shard(at.local + name, (2 * (stop - start), self.hidden), stack_rows(pieces, self.hidden))


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
