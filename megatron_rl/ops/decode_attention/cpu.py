"""`decode_attention` in C++ (csrc/cpu/decode_attention.cpp), float32: one pass over exactly the cached tokens of each
sequence. OpenMP over sequences and key heads; a row's result does not depend on the other rows."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cpu as requires

__all__ = ["decode_attention", "requires"]


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
    if qkv.dtype != torch.float32:
        raise ValueError(f"decode_attention=cpu computes in float32, not {qkv.dtype}: leave the implementation unset")
    rows, heads, head_dim = qkv.shape
    out = torch.empty(rows, (heads - 2 * cache.shape[1]) * head_dim)
    sinks = torch.empty(0) if sinks is None else sinks.float().contiguous()
    rule = (scale, window or 0, softcap or 0.0, sinks)
    torch.ops.megatron_rl_cpu.decode_attention(qkv, cos, sin, cache, positions, out, *rule, torch.get_num_threads())
    return out
