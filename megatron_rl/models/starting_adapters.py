"""`StartingAdapters`: the adapters of a PEFT folder as one rank of a Megatron layout holds them.

PEFT has an A for each of q, k and v; the layer that Megatron makes of them has one adapter. Its rank is the sum of
theirs: each part has its own rows of A and its own columns of B, its slot, and elsewhere B is zero and stays so
(`mask`).
Layers of one kind have adapters of one size, as a checkpoint that stacks them needs: what a layer lacks is masked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.layouts import megatron_layout
from megatron_rl.models.peft_adapters import Entry, PeftAdapters
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard.layout import Shard, Span


class Slot(NamedTuple):
    """The columns of B, and rows of A, that are those of a logical tensor."""

    start: int
    stop: int
    factor: float

    @property
    def range(self) -> slice:
        return slice(self.start, self.stop)


class Start(NamedTuple):
    """What an adapter starts from."""

    a: Tensor  # [rank, in], fp32 or the file's dtype; this rank's columns
    b: Tensor  # [out, rank]; this rank's rows
    scale: float | Tensor  # alpha / rank; [rank] where it differs
    mask: Tensor | None = None  # like b: 1 where B is trained; None = everywhere
    slots: Mapping[str, Slot] | None = (
        None  # by logical tensor, of those that have an adapter; None = all have all of it
    )


class StartingAdapters:
    """Of a Megatron model of ``architecture``, whatever its layout.

    Args:
        layers: names of the linear layers that can have adapters.

    Raises:
        ConfigError: a layer that has an adapter can have none here.
    """

    def __init__(self, adapters: PeftAdapters, architecture: Architecture, layers: Collection[str]) -> None:
        self.adapters = adapters
        self._ranks: dict[str, int] = {}
        self._factors: dict[str, set[float]] = {}
        placed = set()
        layout = megatron_layout(architecture, RankGrid(ParallelSizes(), 1), padded_vocab(architecture.vocab, 1))
        for shard in layout.shards(0):
            kind = kind_of(shard.name)
            if kind.rpartition(".")[2] in layers:
                slots = self._slots(shard)
                placed |= set(slots)
                self._ranks[kind] = max([self._ranks.get(kind, 0), *(slot.stop for slot in slots.values())])
                self._factors.setdefault(kind, set()).update(slot.factor for slot in slots.values())
        self._check_placed(placed)

    def _check_placed(self, placed: set[str]) -> None:
        other = [tensor for tensor in self.adapters.tensors if tensor not in placed]
        if other:
            raise ConfigError(
                f"{self.adapters.path} has adapters of {', '.join(other[:3])}, which can have none here: only the "
                "projections of attention and the feed-forward layers, experts and shared experts can"
            )

    @property
    def targets(self) -> list[str]:
        """The names of the layers that have some."""
        return sorted({kind.rpartition(".")[2] for kind, rank in self._ranks.items() if rank})

    def has(self, name: str) -> bool:
        """Whether any layer of the kind of ``name`` has an adapter."""
        return self._ranks.get(kind_of(name), 0) > 0

    def start(self, name: str, shard: Shard, transposed: bool) -> Start:
        """Of one rank's part ``shard`` of the weight of layer ``name``.

        Args:
            transposed: the weight is ``[in, out]``.
        """
        outputs, inputs = reversed(shard.shape) if transposed else shard.shape
        rank, slots = self._ranks[kind_of(name)], self._slots(shard)
        a, b, mask = torch.zeros(rank, inputs), torch.zeros(outputs, rank), torch.zeros(outputs, rank)
        for span in shard.spans:
            if span.tensor in slots:
                self._fill(a, b, mask, span, slots[span.tensor].range, transposed)
        factors = self._factors[kind_of(name)]
        scale: float | Tensor = next(iter(factors))
        if len(factors) > 1:
            scale = torch.zeros(rank)
            for slot in slots.values():
                scale[slot.range] = slot.factor
        one = isinstance(scale, float) and all(slot.range == slice(0, rank) for slot in slots.values())
        trained = bool(mask.all())
        return Start(a, b, scale, None if trained else mask, None if trained and one else slots)

    def _fill(self, a: Tensor, b: Tensor, mask: Tensor, span: Span, own: slice, transposed: bool) -> None:
        if transposed:
            expert = span.row_start // self.adapters.places[span.tensor].inputs
            update = self.adapters.read(span.tensor, expert)
            a[own], b[:, own], mask[:, own] = update.a, update.b, 1.0
            return
        update = self.adapters.read(span.tensor)
        rows = slice(span.row, span.row + span.num_rows)
        a[own, span.col : span.col + span.num_cols] = update.a[:, span.col_start : span.col_stop]
        b[rows, own], mask[rows, own] = update.b[span.row_start : span.row_stop], 1.0

    def _slots(self, shard: Shard) -> dict[str, Slot]:
        """By tensor; of those that the folder keeps in one pair of matrices it is the same."""
        found: dict[str, Slot] = {}
        of_pair: dict[str, Slot] = {}
        end = 0
        for tensor, entry in self._adapted(shard):
            if entry.module not in of_pair:
                of_pair[entry.module] = Slot(end, end + entry.rank, entry.factor)
                end += entry.rank
            found[tensor] = of_pair[entry.module]
        return found

    def _adapted(self, shard: Shard) -> Iterator[tuple[str, Entry]]:
        for tensor in dict.fromkeys(span.tensor for span in shard.spans):
            entry = self.adapters.entry(tensor)
            if entry is not None:
                yield tensor, entry


def kind_of(name: str) -> str:
    """The same for a layer of every transformer layer and expert, whether named in the whole model or as a weight of a
    rank that has all layers."""
    return re.sub(r"\.\d+(?=\.)", ".*", name.removesuffix(".weight").replace("local_experts.", ""))
