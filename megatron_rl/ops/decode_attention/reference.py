"""`decode_attention` in torch, on any device and dtype. The queries of one key head are rows of one small matrix, so
that grouped keys are never expanded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, positions: Tensor, length: int, window: int | None = None
) -> Tensor:
    """See `megatron_rl.ops.decode_attention.interface.decode_attention`."""
    rows, heads, head_dim = qkv.shape
    kv_heads = cache.shape[1]
    rotated = qkv[:, : heads - kv_heads, : cos.shape[-1]]
    torch.addcmul(rotated * cos, rotated.roll(cos.shape[-1] // 2, -1), sin, out=rotated)
    queries, keys, values = qkv.split([heads - 2 * kv_heads, kv_heads, kv_heads], 1)
    index = torch.arange(rows, device=qkv.device)
    cache[index, :, :, positions] = torch.stack([keys, values], 2)
    places = torch.arange(length, device=qkv.device)
    hidden = places > positions[:, None]
    if window is not None:
        hidden |= places <= positions[:, None] - window
    mask = torch.zeros(hidden.shape, dtype=qkv.dtype, device=qkv.device).masked_fill_(hidden, -math.inf)
    context = F.scaled_dot_product_attention(
        queries.reshape(rows, kv_heads, -1, head_dim),
        cache[:rows, :, 0, :length],
        cache[:rows, :, 1, :length],
        attn_mask=mask[:, None, None],
    )
    return context.flatten(1)
