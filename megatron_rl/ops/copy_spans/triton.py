"""`copy_spans` in Triton: one program per tile, in at most four launches, by alignment and by width.

Tensors are reached from one base pointer per side by element offsets. Offsets, strides and widths of aligned tiles are
stored in packs of `PACK` elements, which proves their divisibility to the compiler: it then loads 16 bytes at a time.
"""

# ruff: noqa: N803  (Triton's constexpr arguments are upper case by convention)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rl.ops.number_types import number_types
from megatron_rl.ops.tiling import joined_rows, tile_table
from megatron_rl.ops.triton_numbers import cast_bits, requires

__all__ = ["copy_spans", "requires"]

PACK = 16
WIDE, NARROW = (4, 1024), (64, 64)  # rows and columns of a tile
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def copy_tiles(
    src, dst, tiles, SRC: tl.constexpr, DST: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Tile columns: source offset, destination offset, rows, cols, source stride, destination stride."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 6
    src_offset = tl.load(tile) * PACK
    dst_offset = tl.load(tile + 1) * PACK
    rows = tl.load(tile + 2)
    cols = tl.load(tile + 3) * PACK
    src_stride = tl.load(tile + 4) * PACK
    dst_stride = tl.load(tile + 5) * PACK
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (col < cols)
    x = tl.load(src + src_offset + row * src_stride + col, mask=inside, other=0)
    tl.store(dst + dst_offset + row * dst_stride + col, cast_bits(x, SRC, DST), mask=inside)


@torch.no_grad()
def copy_spans(sources: list[Tensor], destinations: list[Tensor], jobs: Tensor) -> None:
    """See `megatron_rl.ops.copy_spans.interface.copy_spans`."""
    types = number_types(sources[0].dtype, destinations[0].dtype)
    src, dst = _base(sources), _base(destinations)
    table = _from_bases(sources, destinations, joined_rows(jobs))
    bases_aligned = src.data_ptr() % 16 == 0 and dst.data_ptr() % 16 == 0
    numbers = table[:, [0, 1, 3]] % PACK | torch.where(table[:, 2:3] > 1, table[:, 4:] % PACK, 0).sum(1, keepdim=True)
    aligned = (numbers == 0).all(1) & bases_aligned
    wide = table[:, 3] >= NARROW[1] * 4
    for pack, by_alignment in ((PACK, aligned), (1, ~aligned)):
        for shape, by_width in ((WIDE, wide), (NARROW, ~wide)):
            tiles = _tiles(table[by_alignment & by_width], shape, pack)
            if len(tiles):
                copy_tiles[(len(tiles),)](src, dst, tiles.to(dst.device), *types, pack, *shape)


def _base(tensors: list[Tensor]) -> Tensor:
    """The first tensor that has memory, as integers of the element size."""
    tensor = next((tensor for tensor in tensors if tensor.numel()), tensors[0])
    return tensor.detach().view(-1).view(BITS[tensor.element_size()])


def _from_bases(sources: list[Tensor], destinations: list[Tensor], jobs: Tensor) -> Tensor:
    """[n, 6]: the columns of `copy_tiles`, offsets counted from the bases."""
    columns = []
    for tensors, index, offset in ((sources, jobs[:, 0], jobs[:, 2]), (destinations, jobs[:, 1], jobs[:, 3])):
        base, size = _base(tensors).data_ptr(), tensors[0].element_size()
        starts = [(tensor.data_ptr() - base) // size if tensor.numel() else 0 for tensor in tensors]
        columns.append(torch.tensor(starts, dtype=torch.int64)[index] + offset)
    return torch.stack([*columns, *jobs[:, 4:].unbind(1)], 1)


def _tiles(table: Tensor, shape: tuple[int, int], pack: int) -> Tensor:
    """[t, 6]: the same columns for tiles of at most ``shape``, horizontal quantities in packs."""
    tiles = tile_table(table[:, 2], table[:, 3], shape[0] * shape[1], shape[1], shape[0])
    item, row, col, rows, cols = tiles.unbind(1)
    src_stride, dst_stride = table[item, 4], table[item, 5]
    src_offset = table[item, 0] + row * src_stride + col
    dst_offset = table[item, 1] + row * dst_stride + col
    return torch.stack(
        [src_offset // pack, dst_offset // pack, rows, cols // pack, src_stride // pack, dst_stride // pack], 1
    )
