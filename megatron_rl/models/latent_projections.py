"""The projections of latent attention: `LatentRows` into latents, which every rank holds whole, and `HeadRows` out of
them, of which each tensor-parallel rank holds those of its heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rl.models.parameters import Parameter, Place, Shape, row_shape, whole
from megatron_rl.reshard.layout import Shard, Span, block, stack_rows


@dataclass(frozen=True, slots=True)
class HeadRows(Parameter):
    """A column-parallel linear layer, or a number for each head: a rank holds a block of rows."""

    hf: str
    rows: int
    cols: int | None  # None = numbers
    megatron_name: str

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return [(self.hf, row_shape(self.rows, self.cols))]

    def megatron(self, at: Place) -> Iterable[Shard]:
        return [self._block(at, self.megatron_name)]

    def rollout(self, at: Place) -> Iterable[Shard]:
        return [self._block(at, self.hf)]

    def _block(self, at: Place, name: str) -> Shard:
        start, stop = block(self.rows, at.tp.index, at.tp.count, f"the rows of {self.hf}")
        span = Span(at.hf + self.hf, start, stop, 0, self.cols or 1, 0, 0)
        return Shard(at.local + name, row_shape(stop - start, self.cols), (span,))


@dataclass(frozen=True, slots=True)
class LatentRows(Parameter):
    """Replicated linear layers of one input: apart in files and in Megatron, below one another in SGLang."""

    parts: tuple[tuple[str, int, str], ...]  # name in files, rows, name in Megatron
    cols: int
    rollout_name: str

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return [(hf, (rows, self.cols)) for hf, rows, _ in self.parts]

    def megatron(self, at: Place) -> Iterable[Shard]:
        return [whole(at.local + megatron, at.hf + hf, (rows, self.cols)) for hf, rows, megatron in self.parts]

    def rollout(self, at: Place) -> Iterable[Shard]:
        pieces = [(at.hf + hf, 0, rows) for hf, rows, _ in self.parts]
        shape = (sum(rows for _, rows, _ in self.parts), self.cols)
        return [Shard(at.local + self.rollout_name, shape, stack_rows(pieces, self.cols))]
