"""`block_quantize` in Triton: one program per 128 x 128 block."""

# ruff: noqa: N803  (Triton's constexpr arguments are upper case by convention)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rl.ops.block_quantize.interface import BLOCK, empty_result
from megatron_rl.ops.number_types import NUMBER_TYPES
from megatron_rl.ops.triton_numbers import e4m3_from, f32_bits_from, requires

__all__ = ["block_quantize", "requires"]


@triton.jit
def quantize_blocks(x, codes, scales, rows, cols, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """``x`` and ``codes`` are integer views; the grid is (blocks across, blocks down)."""
    row = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < cols)
    wide = f32_bits_from(tl.load(x + row * cols + col, mask=inside, other=0), TYPE)
    # Magnitudes order as integers, NaN above infinity: the maximum carries NaN.
    largest = tl.max(tl.max((wide & 0x7FFFFFFF).to(tl.int32), axis=1), axis=0)
    amax = tl.where(largest > 0x2B8CBCCC, largest, 0x2B8CBCCC).to(tl.float32, bitcast=True)  # at least 1e-12
    scale = tl.math.div_rn(amax, 448.0)
    scale = tl.where(largest > 0x7F800000, 0x7FC00000, scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    scaled = tl.math.div_rn(wide.to(tl.float32, bitcast=True), tl.full([BLOCK, BLOCK], 1.0, tl.float32) * scale)
    tl.store(codes + row * cols + col, e4m3_from(scaled.to(tl.uint32, bitcast=True)), mask=inside)
    tl.store(scales + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), scale)


@torch.no_grad()
def block_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `megatron_rl.ops.block_quantize.interface.block_quantize`."""
    codes, scales = empty_result(x)
    if x.numel():
        bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
        grid = (scales.shape[1], scales.shape[0])
        quantize_blocks[grid](
            bits, codes.view(torch.uint8), scales, *x.shape, NUMBER_TYPES[x.dtype], BLOCK, num_warps=8
        )
    return codes, scales
