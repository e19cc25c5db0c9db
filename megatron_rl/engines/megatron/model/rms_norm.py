"""RMSNorm for the local layer spec: any device, sequence-parallel aware.

Megatron-Core's local norms refuse sequence parallelism. This one only has to mark its weight, because
`finalize_model_grads` then sums the weight's gradient over the tensor-parallel ranks, each of which saw a part of the
sequence.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.ops.rms_norm import rms_norm


class RMSNorm(torch.nn.Module):
    """`ops.rms_norm` over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), 1.0 - self.offset, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``, same dtype."""
        return rms_norm(x, self.weight.float() + self.offset if self.offset else self.weight, self.eps)
