"""`copy_spans` in C++ (csrc/cpu/copy_spans.cpp): OpenMP over pieces, AVX-512/AVX2 casts, non-temporal stores."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cpu as requires
from megatron_rl.ops.number_types import number_types

__all__ = ["copy_spans", "requires"]


@torch.no_grad()
def copy_spans(sources: list[Tensor], destinations: list[Tensor], jobs: Tensor) -> None:
    """See `megatron_rl.ops.copy_spans.interface.copy_spans`."""
    types = number_types(sources[0].dtype, destinations[0].dtype)
    torch.ops.megatron_rl_cpu.copy_spans(sources, destinations, jobs, *types, torch.get_num_threads())
