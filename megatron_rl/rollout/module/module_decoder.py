"""`ModuleDecoder`: a module of `transformers` with its own cache, as the local engine's scheduler drives a decoder.

Modules keep one length for all rows of a cache, so all prompts of a batch have the same length, and no row joins later.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rl.config import ConfigError
from megatron_rl.rollout.local.sharding import TensorParallel


class ModuleCache:
    """The module's own cache of a batch; what it holds is up to the module."""

    def __init__(self) -> None:
        self.values: Any = None
        self.count = 0  # rows

    def rows(self, length: int) -> int:
        """How many sequences fit: nobody knows."""
        return 1 << 30

    def fill(self, values: Any, sources: Tensor) -> None:
        """Take the cache of a batch of prompts; row i continues prompt ``sources[i]``."""
        values.reorder_cache(sources)
        self.values, self.count = values, len(sources)

    def move(self, targets: Tensor, sources: Tensor, length: int) -> None:
        """Copy rows ``sources`` over rows ``targets``."""
        index = torch.arange(self.count, device=targets.device)
        index[targets] = sources
        self.values.reorder_cache(index)

    def keep(self, count: int) -> None:
        """Drop rows from ``count`` on."""
        if count < self.count:
            self.values.reorder_cache(torch.arange(count))
            self.count = count

    def release(self) -> None:
        self.values, self.count = None, 0


class ModuleDecoder:
    """``module`` in evaluation mode."""

    def __init__(self, module: nn.Module, vocab: int) -> None:
        self.module, self.vocab = module.eval(), vocab
        self.cache, self.tp = ModuleCache(), TensorParallel()
        accepted = inspect.signature(module.forward).parameters
        self._positions = "position_ids" in accepted
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def reserve(self, rows: int, length: int) -> None:
        """Forget the sequences before."""
        self.cache.release()

    def prefill(self, tokens: Tensor, lengths: Tensor, sources: Tensor, row: int) -> Tensor:
        """As `rollout.local.decoder.Decoder.prefill`, for prompts of one length and an empty cache."""
        assert row == 0, "a row cannot join a batch"
        assert bool((lengths == tokens.shape[1]).all()), "prompts of a batch have one length"
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        logits, values = self._run(tokens, places, None)
        if not hasattr(values, "reorder_cache"):
            raise ConfigError(
                f"{type(self.module).__name__} keeps no cache that can be reordered, which generation here needs: "
                "use a model of another kind"
            )
        self.cache.fill(values, sources)
        return logits

    def decode(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """As `Decoder.decode`."""
        self.cache.keep(len(tokens))
        return self._run(tokens[:, None], positions[:, None], self.cache.values)[0]

    def _run(self, tokens: Tensor, places: Tensor, cache: Any) -> tuple[Tensor, Any]:
        given: dict[str, Any] = {"position_ids": places} if self._positions else {}
        found = self.module(input_ids=tokens, past_key_values=cache, use_cache=True, **given, **self._last)
        return found.logits[:, -1].float(), getattr(found, "past_key_values", None)
