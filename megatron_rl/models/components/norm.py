"""`Norm`: RMSNorm, before attention, before the feed-forward layer, over each head, or at the end of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.models.parameters import Parameter, Replicated


@dataclass(frozen=True, slots=True)
class Norm:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)``.

    Megatron holds the weight as the file has it (``layernorm_zero_centered_gamma``). A rollout engine holds
    ``offset + weight`` and computes a plain norm, as SGLang's Gemma 1 does, or also what the file has.
    """

    hf: str
    size: int
    eps: float
    offset: float = 0.0
    dtype: torch.dtype | None = None  # of files and rollout engines; None = the model's
    summed_in_rollout: bool = True  # rollout engines hold offset + weight

    @property
    def rollout_add(self) -> float:
        """What the weight in a rollout engine has more than the one in the file."""
        return self.offset if self.summed_in_rollout else 0.0

    def parameter(self, megatron_name: str, fused_name: str = "") -> Parameter:
        """Its weight.

        Args:
            fused_name: Megatron's name where TransformerEngine fuses the norm into the linear layer behind it.
        """
        return Replicated(
            self.hf, (self.size,), megatron_name, fused_name, rollout_add=self.rollout_add, dtype=self.dtype
        )
