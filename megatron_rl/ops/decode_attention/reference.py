"""`decode_attention` in torch, on any device and dtype. The queries of one key head are rows of one small matrix, so
that grouped keys are never expanded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    positions: Tensor,
    length: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
    queries = queries.reshape(rows, kv_heads, -1, head_dim)
    keys, values, mask = cache[:rows, :, 0, :length], cache[:rows, :, 1, :length], mask[:, None, None]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale).flatten(1)
    scores = torch.matmul(queries, keys.transpose(-1, -2)).float() * scale
    scores = (scores if softcap is None else torch.tanh(scores / softcap) * softcap) + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, kv_heads, -1, 1).expand(rows, -1, -1, -1)], -1)
    return torch.matmul(scores.softmax(-1)[..., :length].to(qkv.dtype), values).flatten(1)
