"""The contract of `block_quantize`: DeepSeek-V3's block-wise FP8 weights, which SGLang loads as
``weight`` (float8_e4m3fn) and ``weight_scale_inv`` (float32), with ``value = code * scale``."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.selection import choose

BLOCK = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def block_quantize(x: Tensor, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a matrix by blocks of 128 x 128; blocks at the lower and right edge may be smaller.

    ``scale = max(amax, 1e-12) / 448`` and ``code = round(x / scale)`` to e4m3, to nearest, ties to even, in float32
    with IEEE division, so that all implementations agree bit for bit. A NaN in a block makes its scale and codes NaN
    (0x7FC00000, 0x7F); an infinity makes its scale infinite, its finite elements zero and the infinity NaN.

    Args:
        x: [rows, cols] float32, bfloat16 or float16, contiguous. Cut shards at multiples of 128, so that a block never
            straddles two ranks.
        implementation: forces one ("reference", "cpu", "triton", "cuda"); None takes the best available.

    Returns:
        codes [rows, cols] float8_e4m3fn and scales [ceil(rows / 128), ceil(cols / 128)] float32, on ``x``'s device.

    Raises:
        ValueError: not a contiguous matrix of a supported dtype.
        UnavailableError: the forced implementation cannot run here.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or not x.is_contiguous():
        raise ValueError(
            f"block_quantize takes a contiguous matrix of {', '.join(map(str, DTYPES))}; got {x.dtype} "
            f"{list(x.shape)}, contiguous={x.is_contiguous()}"
        )
    result: tuple[Tensor, Tensor] = choose("block_quantize", x.device.type, implementation)(x.detach())
    return result


def empty_result(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales to be filled by an implementation."""
    rows, cols = x.shape
    scales = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK), dtype=torch.float32, device=x.device)
    return torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=x.device), scales
