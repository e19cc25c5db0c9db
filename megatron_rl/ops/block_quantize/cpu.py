"""`block_quantize` in C++ (csrc/cpu/block_quantize.cpp): OpenMP over blocks, vectorised by the compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.block_quantize.interface import empty_result
from megatron_rl.ops.extension import requires_cpu as requires
from megatron_rl.ops.number_types import NUMBER_TYPES

__all__ = ["block_quantize", "requires"]


@torch.no_grad()
def block_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `megatron_rl.ops.block_quantize.interface.block_quantize`."""
    codes, scales = empty_result(x)
    threads = torch.get_num_threads()
    torch.ops.megatron_rl_cpu.block_quantize(x, codes.view(torch.uint8), scales, NUMBER_TYPES[x.dtype], threads)
    return codes, scales
