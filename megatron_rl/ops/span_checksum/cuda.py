"""`span_checksum` in CUDA (csrc/kernels/span_checksum.cu): all spans in one launch, keys held in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cuda as requires
from megatron_rl.ops.number_types import NUMBER_TYPES, RAW
from megatron_rl.ops.tiling import addresses, tile_table

__all__ = ["requires", "span_checksum"]

OPS = torch.ops.megatron_rl_cuda
TILE_ELEMENTS, TILE_COLS = 65_536, 2048


@torch.no_grad()
def span_checksum(tensors: list[Tensor], spans: Tensor, num_slots: int, as_dtype: torch.dtype | None) -> Tensor:
    """See `megatron_rl.ops.span_checksum.interface.span_checksum`; without ``as_dtype``, units are words."""
    device = tensors[0].device
    sums = torch.zeros(num_slots, dtype=torch.int64, device=device)
    tiles = tile_table(spans[:, 6], spans[:, 7], TILE_ELEMENTS, TILE_COLS)
    if len(tiles) == 0:
        return sums
    types = (RAW, RAW) if as_dtype is None else (NUMBER_TYPES[tensors[0].dtype], NUMBER_TYPES[as_dtype])
    word_bytes = 1 if tensors[0].element_size() == 1 else 2
    with torch.cuda.device_of(tensors[0]):
        OPS.span_checksum(addresses(tensors, device), spans.to(device), tiles.to(device), sums, *types, word_bytes)
    return sums
