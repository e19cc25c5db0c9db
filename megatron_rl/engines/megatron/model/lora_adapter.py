"""`LoraAdapter`: the low-rank update of one of Megatron's linear layers, in that layer's own tensor-parallel layout.

    y = x W^T + scale * (x A^T) B^T          A: [rank, in], B: [out, rank]      (Hu et al. 2021, arXiv:2106.09685)

Under a column-parallel layer A is replicated and B holds the rank's rows; under a row-parallel one A holds the rank's
columns and B is replicated; under a layer that every rank has whole both are. What travels between tensor-parallel
ranks has ``rank`` columns instead of ``in`` or ``out``, and ``W + scale * B A`` of a rank's part of W needs nothing of
another rank's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.engines.megatron.model.hidden_states import whole_hidden
from megatron_rl.engines.megatron.model.lora_places import AdaptedLayer
from megatron_rl.models.lora_update import merged
from megatron_rl.models.starting_adapters import Slot, Start

NO_SLOT = Slot(0, 0, 1.0)  # of a part without an adapter


class LoraAdapter(MegatronModule):
    """Off, it adds nothing at all.

    Args:
        start: this rank's A and B, and what they are multiplied with.
        dropout: share of the inputs that are zeroed while training.
    """

    mask: Tensor | None
    scale: Tensor

    def __init__(self, config: TransformerConfig, layer: AdaptedLayer, start: Start, dropout: float) -> None:
        super().__init__(config=config)
        self.layer_name, self.row_parallel, self.gated = layer.name, layer.row_parallel, layer.gated
        self.replicated, self.transposed, self.is_expert = layer.replicated, layer.transposed, layer.is_expert
        group: dist.ProcessGroup = layer.tp_group
        self.tp_group, self.slots, self.dropout = group, start.slots, dropout
        self.sequence_parallel = config.sequence_parallel and group.size() > 1 and not layer.is_expert
        self.enabled = True
        weight = layer.weight
        self.a, self.b = (torch.nn.Parameter(matrix.to(weight, copy=True)) for matrix in (start.a, start.b))
        # Stored in checkpoints, so that adapters can be merged without the run's configuration.
        scale = torch.as_tensor(start.scale, dtype=torch.float32, device=weight.device).reshape(-1)
        self.register_buffer("scale", scale)
        self.factor: float | Tensor = start.scale if isinstance(start.scale, float) else scale
        # Of an adapter of several parts; a checkpoint has it in B, which is zero there.
        self.register_buffer("mask", None if start.mask is None else start.mask.to(weight), persistent=False)
        for parameter in (self.a, self.b):  # experts' gradients may be summed over other ranks than those of the rest
            parameter.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
            # Whole on each rank; the gradient is a sum over ranks that see different tokens.
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        if layer.is_expert:  # no other rank has it: gradient norms count it here
            self.a.tensor_model_parallel = self.b.tensor_model_parallel = True  # type: ignore[attr-defined]
        elif not self.replicated:
            self._mark_split(self.a if self.row_parallel else self.b)

    def _mark_split(self, parameter: torch.nn.Parameter) -> None:
        """Gradient norms count it on every rank, and the other matrix on one."""
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = 1 if self.row_parallel else 0  # type: ignore[attr-defined]
        parameter.partition_stride = 2 if self.gated else 1  # type: ignore[attr-defined]
        parameter.sequence_parallel = False  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The update of the layer's output from the layer's input ``[s, b, in]`` (of experts ``[tokens, in]``), both as
        this rank holds them."""
        low = F.linear(self._dropped(x), self.a)
        if self.replicated:
            pass
        elif not self.row_parallel:
            low = whole_hidden(low, self.tp_group, self.sequence_parallel)
        elif self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        factor = self.factor.to(low) if isinstance(self.factor, Tensor) else self.factor
        return F.linear(low * factor, self.b if self.mask is None else self.b * self.mask)

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return x
        # Ranks that hold the same inputs must drop the same ones; where inputs are split, each drops its own.
        same = not (self.row_parallel or self.sequence_parallel or self.is_expert)
        with contextlib.nullcontext() if same else get_cuda_rng_tracker().fork():
            return F.dropout(x, self.dropout)

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's ``weight`` with the update in it: a new tensor of the same dtype."""
        if self.transposed:
            return merged(weight, self.b.T, self.a.T, self.factor)
        return merged(weight, self.a, self.b, self.factor)

    def matrices(self, tensor: str | None = None) -> tuple[Tensor, Tensor, float]:
        """See `engines.base.LowRank`."""
        if tensor is not None and self.slots is not None:
            slot = self.slots.get(tensor, NO_SLOT)
            return self.a[slot.range], self.b[:, slot.range], slot.factor
        if isinstance(self.factor, float):
            return self.a, self.b, self.factor
        return self.a, self.b * self.factor.to(self.b), 1.0

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """A, B and the scale as tensors of a distributed checkpoint that any layout can load."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {} if self.replicated else {"a": 1} if self.row_parallel else {"b": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        if self.gated:
            state[prefix + "b"] = apply_swiglu_sharded_factory(state[prefix + "b"], sharded_offsets)
        return state

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Raises ConfigError where the state was trained with another scale."""
        found = state.get(prefix + "scale")
        if found is not None and not torch.equal(found.to(self.scale), self.scale):
            raise ConfigError(
                f"{self.layer_name}: the checkpoint's adapters have alpha / rank = {found.tolist()}, this run's "
                f"{self.scale.tolist()}: resume with the alpha and rank that wrote it"
            )
        super()._load_from_state_dict(state, prefix, *rest)
