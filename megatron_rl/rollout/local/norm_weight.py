"""`NormWeight`: an RMSNorm over one rank's weight as the rollout layout has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_rl.models.components.norm import Norm


@dataclass(frozen=True, slots=True)
class NormWeight:
    """An RMSNorm."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0  # what the norm multiplies with is so much more than ``weight``

    @classmethod
    def of(cls, norm: Norm, weight: torch.Tensor) -> NormWeight:
        return cls(weight, norm.eps, norm.offset - norm.rollout_add)

    @property
    def factor(self) -> torch.Tensor:
        """What is multiplied with; fp32 where it is computed from the weight."""
        return self.weight.float() + self.offset if self.offset else self.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.factor
        if factor.dtype != x.dtype:  # as SGLang's RMSNorm: all of it in fp32
            return F.rms_norm(x.float(), x.shape[-1:], factor.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], factor, self.eps)
