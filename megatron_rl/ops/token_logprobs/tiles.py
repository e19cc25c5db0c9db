"""The loop over tiles, tokens x vocabulary rows, that the fast implementations share.

The softmax is accumulated over tiles ("online softmax", Milakov and Gimelshein 2018, arXiv:1805.02867), so memory does
not grow with the vocabulary. Some logits are kept for the backward pass, which recomputes the others: with small
vocabularies nothing is computed twice. Vocabulary tiles are the outer loop, so that the weight's gradient is finished
tile by tile and needs no second copy in fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.ops.token_logprobs.differentiable import LogprobInputs, LogprobOptions, Softmax, Statistics, nothing


@dataclass(frozen=True, slots=True)
class Tiling:
    """Limits of what is in memory at once."""

    tile_bytes: int  # logits of a tile, counted in fp32
    tile_tokens: int  # tokens of a tile, where the caller does not say
    keep_bytes: int  # fp32 logits kept for the backward pass
    keep_half_bytes: int  # the same in half precision, whose weight gradients leave more room


@dataclass(frozen=True, slots=True)
class Tile:
    """The tokens and vocabulary rows of one step."""

    tokens: slice
    rows: slice
    targets: Tensor  # [tokens] row numbers of the whole weight, -1 = held by another rank
    temperature: float


class TiledKernels(ABC):
    """One call's work; subclasses say how a tile is computed."""

    tiling: Tiling

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], Tensor] = {}  # by first token and first row of the tile
        self.height = 1  # tokens of a tile
        self.width = 1  # rows of a tile; the backward pass must cut as the forward pass did

    @abstractmethod
    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right.T``."""

    @abstractmethod
    def accumulate(self, found: Statistics, logits: Tensor, tile: Tile, with_entropy: bool) -> None:
        """Add a tile of undivided ``logits`` to the statistics ``found`` of its tokens; leaves ``logits`` as it is."""

    @abstractmethod
    def gradient(self, logits: Tensor, tile: Tile, softmax: Softmax) -> Tensor:
        """Gradient of the undivided ``logits``, in their dtype; may overwrite them. ``softmax`` is of all tokens."""

    def statistics(self, inputs: LogprobInputs, keep: bool) -> Statistics:
        hidden, weight, options = inputs.hidden, inputs.weight, inputs.options
        tokens = hidden.shape[0]
        self.height = max(1, min(tokens, options.chunk_tokens or self.tiling.tile_tokens))
        self.width = max(64, self.tiling.tile_bytes // (4 * self.height))
        found = nothing(tokens, hidden.device)
        room = self._room(hidden.dtype) if keep else 0
        for tile in self._tiles(inputs):
            logits = options.capped(self.product(hidden[tile.tokens], weight[tile.rows]))
            self.accumulate(Statistics(*(field[tile.tokens] for field in found)), logits, tile, options.with_entropy)
            room -= logits.nbytes
            if room >= 0:
                self.kept[tile.tokens.start, tile.rows.start] = logits
        return found

    def gradients(
        self, inputs: LogprobInputs, softmax: Softmax, active: Tensor | None, want_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        hidden, weight = inputs.hidden, inputs.weight
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros_like(weight) if want_weight else None
        part: Tensor | None = None
        for tile in self._tiles(inputs):
            logits = self._logits(inputs, tile, active)
            slope = inputs.options.through_cap(logits)
            grad = self.gradient(logits, tile, softmax.select(tile.tokens))
            grad = grad if slope is None else grad.mul_(slope)
            grad_hidden[tile.tokens] += self.product(grad, weight[tile.rows].t())
            if grad_weight is None:
                continue
            more = self.product(grad.t(), hidden[tile.tokens].t())
            part = more if tile.tokens.start == 0 or part is None else part.float().add_(more)
            if tile.tokens.stop == hidden.shape[0]:
                grad_weight[tile.rows] = part
        return grad_hidden.to(hidden.dtype), grad_weight

    def logit_statistics(self, logits: Tensor, targets: Tensor, options: LogprobOptions) -> Statistics:
        found = nothing(len(logits), logits.device)
        self.accumulate(found, logits, whole(logits, targets, options), options.with_entropy)
        return found

    def logit_gradients(self, logits: Tensor, targets: Tensor, softmax: Softmax, options: LogprobOptions) -> Tensor:
        return self.gradient(logits, whole(logits, targets, options), softmax)

    def _room(self, dtype: torch.dtype) -> int:
        return self.tiling.keep_bytes if dtype.itemsize == 4 else self.tiling.keep_half_bytes

    def _logits(self, inputs: LogprobInputs, tile: Tile, active: Tensor | None) -> Tensor:
        """Undivided logits of one tile, capped, free to be overwritten."""
        if active is None:
            kept = self.kept.get((tile.tokens.start, tile.rows.start))
            kept = None if kept is None else kept.clone()  # the backward pass may come twice
        else:
            kept = self._kept_of(active[tile.tokens], tile.rows.start)
        if kept is not None:
            return kept
        return inputs.options.capped(self.product(inputs.hidden[tile.tokens], inputs.weight[tile.rows]))

    def _kept_of(self, tokens: Tensor, first_row: int) -> Tensor | None:
        """A copy of the logits of ``tokens``, ascending numbers of the forward pass; None if not all were kept."""
        if (0, first_row) not in self.kept:
            return None
        first, last = (int(tokens[place]) // self.height * self.height for place in (0, -1))
        parts = [self.kept.get((start, first_row)) for start in range(first, last + 1, self.height)]
        found = [part for part in parts if part is not None]
        return torch.cat(found)[tokens - first] if len(found) == len(parts) else None

    def _tiles(self, inputs: LogprobInputs) -> Iterator[Tile]:
        tokens, temperature = inputs.hidden.shape[0], inputs.options.temperature
        for rows in spans(inputs.weight.shape[0], self.width):
            for span in spans(tokens, self.height):
                yield Tile(span, rows, inputs.targets[span], temperature)


def whole(logits: Tensor, targets: Tensor, options: LogprobOptions) -> Tile:
    """All logits of a call as one tile."""
    return Tile(slice(0, logits.shape[0]), slice(0, logits.shape[1]), targets, options.temperature)


def spans(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
