"""`MergedAdapters`: a base with the adapters of a PEFT folder in it, as a source that conversion reads by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.models.lora_update import merged
from megatron_rl.models.peft_adapters import PeftAdapters
from megatron_rl.reshard.layout import Span
from megatron_rl.weights.source import TensorSource


class MergedAdapters:
    """``W + factor * B A``, in fp32 and then rounded to the dtype that the base has."""

    def __init__(self, base: TensorSource, adapters: PeftAdapters) -> None:
        self._base, self._adapters = base, adapters

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._base

    def dtype(self, tensor: str) -> torch.dtype:
        """As in the base."""
        return self._base.dtype(tensor)

    def read(self, span: Span) -> Tensor:
        """See `TensorSource`."""
        weight, entry = self._base.read(span), self._adapters.entry(span.tensor)
        if entry is None:
            return weight
        cols = slice(span.col_start, span.col_stop)
        place = self._adapters.places[span.tensor]
        if not place.transposed:
            update = self._adapters.read(span.tensor)
            return merged(weight, update.a[:, cols], update.b[span.row_start : span.row_stop], entry.factor)
        parts, row = [], span.row_start
        while row < span.row_stop:  # the rows of one expert after those of another
            expert, first = divmod(row, place.inputs)
            count = min(place.inputs - first, span.row_stop - row)
            update = self._adapters.read(span.tensor, expert)
            own = weight[row - span.row_start : row - span.row_start + count]
            parts.append(merged(own, update.b.T[:, cols], update.a.T[first : first + count], entry.factor))
            row += count
        return torch.cat(parts)
