"""`accumulate` in CUDA (csrc/kernels/accumulate.cu): one launch, every part read once, 16 bytes at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cuda as requires
from megatron_rl.ops.number_types import NUMBER_TYPES
from megatron_rl.ops.tiling import addresses

__all__ = ["accumulate", "requires"]

OPS = torch.ops.megatron_rl_cuda


@torch.no_grad()
def accumulate(parts: Sequence[Tensor], out: Tensor) -> None:
    """See `megatron_rl.ops.accumulate.interface.accumulate`."""
    types = NUMBER_TYPES[parts[0].dtype], NUMBER_TYPES[out.dtype]
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (*parts, out))
    with torch.cuda.device_of(out):
        OPS.accumulate(addresses(list(parts), out.device), out, *types, aligned)
