"""`ClampedExperts`: the experts of gpt-oss in the place of Megatron-Core's `SequentialMLP`.

Their matrices multiply from the right, as files have them: see `models/transposed_experts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.engines.megatron.model.own_modules import become
from megatron_rl.models.activations import clamped_gate


class TransposedLinear(MegatronModule):
    """``x @ weight``, with the bias (a row) beside it; of one expert, which is not cut."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(torch.empty(inputs, outputs, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, outputs, dtype=config.params_dtype))
        if config.perform_initialization:
            init_method(self.weight)
        for parameter in (self.weight, self.bias):  # as ColumnParallelLinear's of an expert
            parameter.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[tokens, inputs] -> [tokens, outputs]``."""
        return x @ self.weight, self.bias


class ClampedMLP(MLP):
    """One expert."""

    limit = 0.0

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """``[tokens, hidden]`` -> the same, times ``per_token_scale``."""
        gates_and_ups, bias = self.linear_fc1(hidden_states)
        output, out_bias = self.linear_fc2(clamped_gate(gates_and_ups + bias, self.limit))
        output = output + out_bias
        return output if per_token_scale is None else output * per_token_scale[:, None].to(output.dtype), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Whole tensors: gates and ups do not lie in two halves."""
        parts = (
            module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)  # type: ignore[operator,union-attr]
            for name, module in self._modules.items()
        )
        return {key: value for part in parts for key, value in part.items()}


class ClampedExperts(SequentialMLP):
    """A rank's experts."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, submodules: MLPSubmodules, limit: float, **options: Any
    ) -> None:
        linears = replace(submodules, linear_fc1=TransposedLinear, linear_fc2=TransposedLinear)
        super().__init__(num_local_experts, config, linears, **options)
        for expert in self.local_experts:
            become(expert, ClampedMLP, limit=limit)
