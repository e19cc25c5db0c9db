"""`ModuleArchitecture`: a model that only its own class in `transformers`, or one of the user's, can compute.

It has no family and so no description of its layers: what a layout needs, the tensors of the module and what its files
call them, is data here, read off the class by `hf_module.py`. The sizes are for whoever limits lengths and tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_rl.models.architecture import Architecture
from megatron_rl.reshard.layout import AS_IT_IS, Held, Shard, Span

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModuleTensor:
    """A parameter of a module, or a buffer that its files hold."""

    shard: Shard  # all of it, by its name in the module; its spans are tensors of the files
    logical: tuple[tuple[str, Shape], ...]  # names and shapes of those tensors
    dtype: torch.dtype | None = None  # of a buffer, which keeps its own; None = that of the weights
    trained: bool = True  # a parameter

    def rows(self, start: int, stop: int) -> Shard:
        """The part with indices ``[start, stop)`` of its first dim."""
        shape, (rows, _) = self.shard.shape, self.shard.matrix_shape
        inner = rows // max(shape[0], 1)
        low, high = start * inner, stop * inner
        return Shard(self.shard.name, (stop - start, *shape[1:]), tuple(_cut(self.shard.spans, low, high)))


def _cut(spans: Iterable[Span], low: int, high: int) -> Iterator[Span]:
    """What of ``spans`` falls into the local rows ``[low, high)``."""
    for span in spans:
        first, last = max(span.row, low), min(span.row + span.num_rows, high)
        if first < last:
            start = span.row_start + first - span.row
            yield replace(span, row_start=start, row_stop=start + last - first, row=first - low)


@dataclass(frozen=True, slots=True)
class ModuleArchitecture(Architecture):
    """Sizes as far as the config has them, and the module's tensors."""

    tensors: tuple[ModuleTensor, ...] = ()
    config_json: str = "{}"
    config_class: Any = None  # of `transformers`, or derived from one of its
    module_class: Any = None  # builds the module from the config


def logical_of(tensors: Sequence[ModuleTensor]) -> dict[str, Shape]:
    """Names and shapes of what the files of a model hold."""
    return {name: shape for tensor in tensors for name, shape in tensor.logical}


def held_of(tensors: Sequence[ModuleTensor]) -> dict[str, Held]:
    """The tensors that are always held in a dtype of their own."""
    found = {name: Held(dtype=tensor.dtype) for tensor in tensors for name, _ in tensor.logical}
    return {name: held for name, held in found.items() if held != AS_IT_IS}
