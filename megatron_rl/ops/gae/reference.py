"""`gae` in torch, on any device: a segmented scan in blocks, linear in the number of tokens.

Masked tokens are compacted, so that a step's successor is its neighbour. Within a block of 32 the recurrence
y_t = x_t + decay * y_{t+1} is one small triangular matrix product for all blocks at once; the blocks' first values then
obey the same recurrence with decay**32, which is solved by recursion (three levels for a million steps). Computed in
float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """See `megatron_rl.ops.gae.interface.gae`."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    steps = mask.nonzero().squeeze(1)
    if steps.numel() == 0:
        return advantages, returns
    bounds = cu_seqlens.to(device=steps.device, dtype=steps.dtype)
    owner = torch.searchsorted(bounds, steps, right=True) - 1
    lengths = torch.bincount(owner, minlength=cu_seqlens.numel() - 1)
    step_values = values[steps].double()
    next_values = torch.zeros_like(step_values)
    next_values[:-1] = torch.where(owner[1:] == owner[:-1], step_values[1:], 0.0)
    deltas = rewards[steps].double() + gamma * next_values - step_values
    found = discounted_suffix_sums(deltas, lengths, gamma * lam)
    advantages[steps] = found.to(values.dtype)
    returns[steps] = (found + step_values).to(values.dtype)
    return advantages, returns


def discounted_suffix_sums(terms: Tensor, lengths: Tensor, decay: float) -> Tensor:
    """y_t = terms_t + decay * y_{t+1} within each segment; 0 follows a segment's last term.

    Args:
        terms: ``[n]`` float64, segments end to end.
        lengths: ``[num_segments]`` int64, summing to n; zeros are allowed.
        decay: in [0, 1].
    """
    num_blocks = (lengths + BLOCK - 1) // BLOCK
    first_term = lengths.cumsum(0) - lengths
    first_place = (num_blocks.cumsum(0) - num_blocks) * BLOCK
    device = terms.device
    place = torch.arange(terms.numel(), device=device) + torch.repeat_interleave(first_place - first_term, lengths)
    padded = terms.new_zeros(int(num_blocks.sum()) * BLOCK)
    padded[place] = terms
    powers = torch.tensor(decay, dtype=terms.dtype, device=device) ** torch.arange(BLOCK + 1, device=device)
    lane = torch.arange(BLOCK, device=device)
    distance = lane - lane.unsqueeze(1)
    within = torch.where(distance >= 0, powers[distance.clamp_min(0)], 0.0)
    sums = padded.view(-1, BLOCK) @ within.T
    if int(num_blocks.max()) > 1:
        starts = discounted_suffix_sums(sums[:, 0].contiguous(), num_blocks, decay**BLOCK)
        segment = torch.repeat_interleave(torch.arange(num_blocks.numel(), device=device), num_blocks)
        entering = torch.zeros_like(starts)
        entering[:-1] = torch.where(segment[1:] == segment[:-1], starts[1:], 0.0)
        sums += entering.unsqueeze(1) * powers[BLOCK - lane]
    return sums.flatten()[place]
