"""`LoraAdapter`: the low-rank update of one of Megatron's linear layers, in that layer's own tensor-parallel layout.

    y = x W^T + scale * (x A^T) B^T          A: [rank, in], B: [out, rank]      (Hu et al. 2021, arXiv:2106.09685)

Under a column-parallel layer A is replicated and B holds the rank's rows; under a row-parallel one A holds the rank's
columns and B is replicated. What travels between tensor-parallel ranks has ``rank`` columns instead of ``in`` or
``out``, and ``W + scale * B A`` of a rank's part of W needs nothing of another rank's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
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
from megatron_rl.models.lora_update import first_values, merged, peft_facts


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """The layer that an adapter belongs to."""

    name: str  # of the layer in the whole model, the same on every layout: seeds the initial values
    weight: Tensor  # the rank's part: [out / tp, in] or [out, in / tp]
    row_parallel: bool  # its inputs are split over the ranks, not its outputs
    gated: bool  # its outputs are [gate; up], each split over the ranks


class LoraAdapter(MegatronModule):
    """A is drawn (`first_values`), B is zero: at first it adds 0.

    The draw is that of the whole A, so initial values do not depend on the layout. Off, it adds nothing at all.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer: AdaptedLayer,
        tp_group: dist.ProcessGroup,
        *,
        rank: int,
        scale: float,
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__(config=config)
        self.layer_name, self.row_parallel, self.gated = layer.name, layer.row_parallel, layer.gated
        self.tp_group, self.factor, self.dropout = tp_group, scale, dropout
        self.sequence_parallel = config.sequence_parallel and tp_group.size() > 1
        self.enabled = True
        outputs, inputs = layer.weight.shape
        self.a = torch.nn.Parameter(self._first_values(rank, inputs, seed).to(layer.weight))
        self.b = torch.nn.Parameter(torch.zeros(outputs, rank).to(layer.weight))
        # Stored in checkpoints, so that adapters can be merged without the run's configuration.
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32, device=layer.weight.device))
        split, shared = (self.a, self.b) if self.row_parallel else (self.b, self.a)
        split.tensor_model_parallel = True  # type: ignore[attr-defined]  # gradient norms count it on every rank,
        split.partition_dim = 1 if self.row_parallel else 0  # type: ignore[attr-defined]
        split.partition_stride = 2 if self.gated else 1  # type: ignore[attr-defined]
        # the other one on one rank; its gradient is a sum over ranks that see different tokens.
        shared.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def _first_values(self, rank: int, inputs: int, seed: int) -> Tensor:
        size, index = (self.tp_group.size(), self.tp_group.rank()) if self.row_parallel else (1, 0)
        whole = first_values(self.layer_name, rank, inputs * size, seed)
        return whole[:, index * inputs : (index + 1) * inputs].clone()

    def forward(self, x: Tensor) -> Tensor:
        """The update of the layer's output from the layer's input ``[s, b, in]``, both as this rank holds them."""
        low = F.linear(self._dropped(x), self.a)
        if not self.row_parallel:
            low = whole_hidden(low, self.tp_group, self.sequence_parallel)
        elif self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return F.linear(low * self.factor, self.b)

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return x
        # Ranks that hold the same inputs must drop the same ones; where inputs are split, each drops its own.
        same = not (self.row_parallel or self.sequence_parallel)
        with contextlib.nullcontext() if same else get_cuda_rng_tracker().fork():
            return F.dropout(x, self.dropout)

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's ``weight`` with the update in it: a new tensor of the same dtype."""
        return merged(weight, self.a, self.b, self.factor)

    @property
    def facts(self) -> dict[str, float]:
        """The fields of PEFT's ``LoraConfig`` that describe it."""
        return peft_facts(self.a.shape[0], self.factor, self.dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """A, B and the scale as tensors of a distributed checkpoint that any layout can load."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"a": 1} if self.row_parallel else {"b": 0},
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
        if found is not None and float(found) != float(self.scale):
            raise ConfigError(
                f"{self.layer_name}: the checkpoint's adapters have alpha / rank = {float(found):g}, this run's "
                f"{float(self.scale):g}: resume with the alpha and rank that wrote it"
            )
        super()._load_from_state_dict(state, prefix, *rest)
