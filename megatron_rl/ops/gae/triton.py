"""`gae` in Triton: one program a sequence, in blocks from its end; within a block a scan over affine maps.

What a token does to (advantage, value) of the step after it is an affine map: a step replaces both, an observation
hands both on. Maps compose associatively, so a block takes logarithmic depth, and the whole is linear in the tokens.
"""

# ruff: noqa: N803  (Triton's constexpr arguments are upper case by convention)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rl.ops.triton_numbers import requires

__all__ = ["gae", "requires"]

BLOCK = 256  # tokens a program holds at once


@triton.jit
def compose(fa, fb, fc, fd, fe, ga, gb, gc, gd, ge):
    """First f, then g: advantage -> a advantage + b value + c, value -> d value + e."""
    return ga * fa, ga * fb + gb * fd, ga * fc + gb * fe + gc, gd * fd, gd * fe + ge


@triton.jit
def scan_sequences(rewards, values, mask, bounds, advantages, returns, gamma, decay, BLOCK: tl.constexpr):
    """The grid is (sequences,); ``gamma`` and ``decay`` are tensors of one float64."""
    sequence = tl.program_id(0)
    start = tl.load(bounds + sequence)
    stop = tl.load(bounds + sequence + 1)
    discount, fading = tl.load(gamma), tl.load(decay)
    lane = tl.arange(0, BLOCK)
    advantage = tl.zeros((1,), tl.float64)
    value = tl.zeros((1,), tl.float64)
    for done in range(0, stop - start, BLOCK):
        place = stop - 1 - done - lane  # backwards: what comes later in the sequence comes first in the scan
        inside = place >= start
        step = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
        r = tl.load(rewards + place, mask=step, other=0.0).to(tl.float64)
        v = tl.load(values + place, mask=step, other=0.0).to(tl.float64)
        a = tl.where(step, fading, 1.0)
        b = tl.where(step, discount, 0.0)
        c = tl.where(step, r - v, 0.0)
        d = tl.where(step, 0.0, 1.0).to(tl.float64)
        e = tl.where(step, v, 0.0)
        a, b, c, d, e = tl.associative_scan((a, b, c, d, e), 0, compose)
        found = a * advantage + b * value + c
        tl.store(advantages + place, tl.where(step, found, 0.0), mask=inside)
        tl.store(returns + place, tl.where(step, found + v, 0.0), mask=inside)
        passed = d * value + e
        last = lane == BLOCK - 1
        advantage = tl.sum(tl.where(last, found, 0.0), axis=0, keep_dims=True)
        value = tl.sum(tl.where(last, passed, 0.0), axis=0, keep_dims=True)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """See `megatron_rl.ops.gae.interface.gae`."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    num_sequences = cu_seqlens.numel() - 1
    if num_sequences == 0 or values.numel() == 0:
        return advantages, returns
    factors = torch.tensor([gamma, gamma * lam], dtype=torch.float64, device=values.device)
    bounds = cu_seqlens.to(device=values.device, dtype=torch.int64)
    steps = mask.to(torch.int8).contiguous()
    scan_sequences[(num_sequences,)](
        rewards.contiguous(), values.contiguous(), steps, bounds, advantages, returns, factors[:1], factors[1:],
        BLOCK, num_warps=4,
    )  # fmt: skip
    return advantages, returns
