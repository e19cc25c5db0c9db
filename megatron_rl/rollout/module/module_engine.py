"""`ModuleEngine`: generation by the module of `transformers` itself, for any model that it can cache and generate with.

It is the local engine with another decoder: each rank holds a whole copy of the model, gets all of its weights at each
push, and decodes prompts of one length together. Slow beside a server, and exact: log-probabilities are the module's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megatron_rl.models import Architecture, hf_config_from, transformers_layout
from megatron_rl.models.layouts import check_rollout
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.reshard import Layout
from megatron_rl.rollout.base import ENGINES
from megatron_rl.rollout.local.local_engine import LocalEngine
from megatron_rl.rollout.local.scheduler import PrefillRequest
from megatron_rl.rollout.module.module_decoder import ModuleDecoder

logger = logging.getLogger(__name__)


@ENGINES.register("transformers")
class ModuleEngine(LocalEngine):
    """Arguments as for `LocalEngine`; ``layout`` is that of `lay_out`, ``kv_cache_bytes`` bounds nothing."""

    @classmethod
    def lay_out(cls, architecture: Architecture, tp: int, replicas: Sequence[Sequence[int]], ep: int = 1) -> Layout:
        module = as_module(architecture)
        check_rollout(module, tp, ep)
        return transformers_layout(module, [rank for ranks in replicas for rank in ranks])

    def _allocate(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        # At run time only: see `models.hf_config.best_architecture`.
        from megatron_rl.models.hf_module import module_of, stored_tensors

        own = as_module(self.architecture)
        module: Any = module_of(own, dtype)
        buffers = {one.shard.name: one.dtype for one in own.tensors if not one.trained}
        for name, buffer in module.named_buffers():
            if (kept := buffers.get(name)) is not None:
                buffer.data = buffer.data.to(kept)
        self._module: nn.Module = module.to(self.device).requires_grad_(False)
        tensors = {name: tensor.detach() for name, tensor in stored_tensors(self._module).items()}
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        logger.info("%s generates, a whole copy on each rank: %.1f MB", type(module).__name__, size)
        return tensors

    def _make_decoder(self, dtype: torch.dtype, kv_cache_bytes: int) -> Any:
        self.prefill_tokens = 1 << 62  # a batch begins at once
        return ModuleDecoder(self._module, self.architecture.vocab)

    def _batches(self, requests: list[PrefillRequest], rows: int) -> list[list[PrefillRequest]]:
        """Prompts of one length, as many as start together."""
        batches: list[list[PrefillRequest]] = []
        free, length = 0, 0
        for request in sorted(requests, key=lambda request: -len(request.token_ids)):
            if len(request.token_ids) != length or len(request.sequences) > free:
                batches.append([])
                free, length = rows, len(request.token_ids)
            batches[-1].append(request)
            free -= len(request.sequences)
        return batches


def as_module(architecture: Architecture) -> ModuleArchitecture:
    """The same model as its module in `transformers`."""
    if isinstance(architecture, ModuleArchitecture):
        return architecture
    from megatron_rl.models.hf_module import architecture_of_config  # see `_allocate`

    return architecture_of_config(hf_config_from(architecture))
