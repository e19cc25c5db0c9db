"""`gae` as the textbook's backward loop, token by token: the definition of correct, on any device."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """See `megatron_rl.ops.gae.interface.gae`."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    bounds = cu_seqlens.tolist()
    steps = mask.tolist()
    for start, stop in itertools.pairwise(bounds):
        next_value = values.new_zeros(())
        next_advantage = values.new_zeros(())
        for t in range(stop - 1, start - 1, -1):
            if not steps[t]:
                continue
            delta = rewards[t] + gamma * next_value - values[t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value = values[t]
            advantages[t] = next_advantage
            returns[t] = next_advantage + next_value
    return advantages, returns
