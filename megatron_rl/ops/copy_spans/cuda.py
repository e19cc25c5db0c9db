"""`copy_spans` in CUDA (csrc/kernels/copy_spans.cu): all jobs in one launch, 16-byte accesses where aligned."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cuda as requires
from megatron_rl.ops.number_types import number_types
from megatron_rl.ops.tiling import addresses, joined_rows, tile_table

__all__ = ["copy_spans", "requires"]

OPS = torch.ops.megatron_rl_cuda
TILE_ELEMENTS = 8192


@torch.no_grad()
def copy_spans(sources: list[Tensor], destinations: list[Tensor], jobs: Tensor) -> None:
    """See `megatron_rl.ops.copy_spans.interface.copy_spans`."""
    device = destinations[0].device
    jobs = joined_rows(jobs)
    tiles = tile_table(jobs[:, 4], jobs[:, 5], TILE_ELEMENTS, TILE_ELEMENTS)
    if len(tiles) == 0:
        return
    types = number_types(sources[0].dtype, destinations[0].dtype)
    tables = (addresses(sources, device), addresses(destinations, device), jobs.to(device), tiles.to(device))
    with torch.cuda.device_of(destinations[0]):
        OPS.copy_spans(*tables, *types, destinations[0].element_size())
