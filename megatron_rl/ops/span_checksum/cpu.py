"""`span_checksum` in C++ (csrc/cpu/span_checksum.cpp): OpenMP over rows, keys kept in the first-level cache."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cpu as requires
from megatron_rl.ops.number_types import NUMBER_TYPES, RAW

__all__ = ["requires", "span_checksum"]


@torch.no_grad()
def span_checksum(tensors: list[Tensor], spans: Tensor, num_slots: int, as_dtype: torch.dtype | None) -> Tensor:
    """See `megatron_rl.ops.span_checksum.interface.span_checksum`; without ``as_dtype``, units are words."""
    sums = torch.zeros(num_slots, dtype=torch.int64)
    types = (RAW, RAW) if as_dtype is None else (NUMBER_TYPES[tensors[0].dtype], NUMBER_TYPES[as_dtype])
    word_bytes = 1 if tensors[0].element_size() == 1 else 2
    torch.ops.megatron_rl_cpu.span_checksum(tensors, spans, sums, *types, word_bytes, torch.get_num_threads())
    return sums
