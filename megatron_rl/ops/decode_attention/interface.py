"""The contract of `decode_attention` and its edge checks.

For each sequence: rotate its query heads and key heads by their position, put key and value into the cache at that
position, and attend from each query head to positions 0 up to it, or to a window of them. Query head h reads key
head ``h // (q_heads / kv_heads)``. Heads are in the half-split form of Hugging Face: channel i rotates with
i + rotary_dim / 2, and those from rotary_dim on are left as they are. There is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.selection import choose


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    positions: Tensor,
    length: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Context of each query head, ``[rows, q_heads * head_dim]``.

    Args:
        qkv: ``[rows, q_heads + 2 * kv_heads, head_dim]``: queries, keys, values; queries and keys are rotated in place.
        cos: ``[rows, 1, rotary_dim]`` of each row's position.
        sin: the same of sines, negative in the first half.
        cache: ``[rows or more, kv_heads, 2, max_length, head_dim]``, keys and values; row i of ``qkv`` owns row i.
        positions: ``[rows]`` int64, where each new token stands; what the cache holds before it is attended to.
        length: largest position + 1, which spares asking the device.
        scale: of the products of queries and keys; None = head_dim ** -0.5.
        window: positions that a query sees at most, its own included; None = all up to it.
        softcap, sinks: as of `packed_attention`.
        implementation: forces one; None takes the best available: "cpu" for float32 only, else "reference".

    Raises:
        ValueError: shapes do not fit, or the tensors are not contiguous or not of one dtype.
        UnavailableError: the forced implementation cannot run here.
    """
    rows, heads, head_dim = qkv.shape
    kv_heads, max_length = cache.shape[1], cache.shape[3]
    if (heads - 2 * kv_heads) % kv_heads or heads <= 2 * kv_heads or cache.shape[0] < rows or cache.shape[2] != 2:
        raise ValueError(f"qkv {list(qkv.shape)} does not fit the cache {list(cache.shape)}")
    turned = cos.shape[-1]
    if cache.shape[4] != head_dim or cos.shape != sin.shape or cos.shape != (rows, 1, turned) or turned % 2:
        raise ValueError(f"cos {list(cos.shape)} or cache {list(cache.shape)} do not fit head_dim {head_dim}")
    if turned > head_dim:
        raise ValueError(f"cos {list(cos.shape)} would turn more than the {head_dim} channels of a head")
    if not 0 < length <= max_length or positions.shape != (rows,):
        raise ValueError(f"length {length} of positions {list(positions.shape)} does not fit {max_length} in the cache")
    tensors = (qkv, cos, sin, cache)
    if {tensor.dtype for tensor in tensors} != {qkv.dtype} or not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("qkv, cos, sin and cache must be contiguous and of one dtype")
    window = None if window is None or window >= length else window
    if implementation is None and qkv.dtype != torch.float32:
        implementation = "reference"
    run = choose("decode_attention", qkv.device.type, implementation)
    scale = head_dim**-0.5 if scale is None else scale
    return run(qkv, cos, sin, cache, positions, length, scale, window, softcap, sinks)
