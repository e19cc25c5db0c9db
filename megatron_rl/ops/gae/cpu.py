"""`gae` in C++ (csrc/cpu/gae.cpp): one backward pass over each sequence, sequences shared out over threads."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cpu as requires

__all__ = ["gae", "requires"]


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """See `megatron_rl.ops.gae.interface.gae`."""
    advantages = torch.empty_like(values, memory_format=torch.contiguous_format)
    returns = torch.empty_like(advantages)
    inputs = (rewards.contiguous(), values.contiguous(), mask.contiguous(), cu_seqlens.to(torch.int64).contiguous())
    torch.ops.megatron_rl_cpu.gae(*inputs, advantages, returns, gamma, lam, torch.get_num_threads())
    return advantages, returns
