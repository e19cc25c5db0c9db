"""`block_quantize` in CUDA (csrc/kernels/block_quantize.cu): a tile per block, held in registers, read once."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.block_quantize.interface import empty_result
from megatron_rl.ops.extension import requires_cuda as requires
from megatron_rl.ops.number_types import NUMBER_TYPES

__all__ = ["block_quantize", "requires"]

OPS = torch.ops.megatron_rl_cuda


@torch.no_grad()
def block_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `megatron_rl.ops.block_quantize.interface.block_quantize`."""
    codes, scales = empty_result(x)
    if x.numel():
        with torch.cuda.device_of(x):
            OPS.block_quantize(x, codes.view(torch.uint8), scales, NUMBER_TYPES[x.dtype])
    return codes, scales
