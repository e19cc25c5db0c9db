"""Megatron-Core's feed-forward layer with its gated activation as one op; everything else stays Megatron's."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_rl.ops.swiglu import swiglu


class GatedMLP(MLP):
    """`MLP` that runs ``linear_fc1``, `ops.swiglu`, ``linear_fc2`` where that is what its configuration says.

    Megatron's unfused form makes five passes over the widest activation of the layer, its fused one needs torch.compile
    or TransformerEngine.
    """

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **rest: Any) -> Any:
        """As Megatron's: ``[s, b, hidden]`` -> the same, and the bias that was not added (None)."""
        if per_token_scale is not None or not self._is_plain_swiglu():
            return super().forward(hidden_states, per_token_scale, **rest)
        gates_and_ups, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gates_and_ups))

    def _is_plain_swiglu(self) -> bool:
        config = self.config
        return (
            config.gated_linear_unit
            and config.activation_func is F.silu
            and self.linear_fc1.bias is None
            and not config.use_te_activation_func
            and config.activation_func_clamp_value is None
            and config.glu_linear_offset == 0.0
        )
