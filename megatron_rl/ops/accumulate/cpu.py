"""`accumulate` in C++ (csrc/cpu/accumulate.cpp): one pass over the parts, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cpu as requires
from megatron_rl.ops.number_types import NUMBER_TYPES

__all__ = ["accumulate", "requires"]


@torch.no_grad()
def accumulate(parts: Sequence[Tensor], out: Tensor) -> None:
    """See `megatron_rl.ops.accumulate.interface.accumulate`."""
    types = NUMBER_TYPES[parts[0].dtype], NUMBER_TYPES[out.dtype]
    torch.ops.megatron_rl_cpu.accumulate(list(parts), out, *types, torch.get_num_threads())
