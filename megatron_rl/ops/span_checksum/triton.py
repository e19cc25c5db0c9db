"""`span_checksum` in Triton: one program per tile, 64-bit arithmetic that wraps, one atomic addition each."""

# ruff: noqa: N803  (Triton's constexpr arguments are upper case by convention)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rl.ops.number_types import NUMBER_TYPES, RAW
from megatron_rl.ops.tiling import addresses, tile_table
from megatron_rl.ops.triton_numbers import cast_bits, requires

__all__ = ["requires", "span_checksum"]

ROWS, COLS, PACK = 16, 256, 16


@triton.jit
def mix(x):
    """SplitMix64's finaliser on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def checksum_tiles(
    tensor,
    tiles,
    sums,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    PACK: tl.constexpr,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Tile columns: slot, key, logical row and column, rows, and in packs: offset from ``tensor``, cols, stride."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 8
    key = tl.load(tile + 1).to(tl.uint64, bitcast=True)
    logical_row = tl.load(tile + 2)
    logical_col = tl.load(tile + 3)
    rows = tl.load(tile + 4)
    offset = tl.load(tile + 5) * PACK  # a product with a constant is known to be divisible by it: wide loads
    cols = tl.load(tile + 6) * PACK
    stride = tl.load(tile + 7) * PACK
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(tensor + offset + row[:, None] * stride + col[None, :], mask=inside, other=0)
    word = (cast_bits(x, SRC, DST).to(tl.int64) & MASK).to(tl.uint64, bitcast=True) + 1
    col_key = mix((logical_col + col).to(tl.uint64) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) | 1
    row_key = mix((logical_row + row).to(tl.uint64) * 0x9E3779B97F4A7C15 + key) | 1
    products = tl.where(inside, word * col_key[None, :], 0) * row_key[:, None]
    total = tl.sum(tl.sum(products, axis=1), axis=0)
    tl.atomic_add(sums + tl.load(tile), total.to(tl.int64, bitcast=True))


@torch.no_grad()
def span_checksum(tensors: list[Tensor], spans: Tensor, num_slots: int, as_dtype: torch.dtype | None) -> Tensor:
    """See `megatron_rl.ops.span_checksum.interface.span_checksum`; without ``as_dtype``, units are words."""
    types, views = (RAW, RAW), tensors
    if as_dtype is not None:
        types = (NUMBER_TYPES[tensors[0].dtype], NUMBER_TYPES[as_dtype])
        integer = torch.int32 if tensors[0].dtype == torch.float32 else torch.int16
        views = [tensor.detach().view(-1).view(integer) for tensor in tensors]
    base = next((view for view in views if view.numel()), views[0])
    sums = torch.zeros(num_slots, dtype=torch.int64, device=base.device)
    mask = 0xFF if base.element_size() == 1 else 0xFFFF
    tiles = _tiles(views, base, spans)
    packed = (tiles[:, 5:] % PACK == 0).all(1) & (base.data_ptr() % 16 == 0)
    for pack, chosen in ((PACK, tiles[packed]), (1, tiles[~packed])):
        if len(chosen):
            chosen[:, 5:] //= pack
            checksum_tiles[(len(chosen),)](base, chosen.to(base.device), sums, *types, pack, mask, ROWS, COLS)
    return sums


def _tiles(tensors: list[Tensor], base: Tensor, spans: Tensor) -> Tensor:
    """[t, 8]: the columns of `checksum_tiles`, in words."""
    tiles = tile_table(spans[:, 6], spans[:, 7], ROWS * COLS, COLS, ROWS)
    item, row, col, rows, cols = tiles.unbind(1)
    index, slot, key, logical_row, logical_col, offset, _, _, stride = spans[item].unbind(1)
    starts = (addresses(tensors, torch.device("cpu")) - base.data_ptr()) // base.element_size()
    offset = starts[index] + offset + row * stride + col
    return torch.stack([slot, key, logical_row + row, logical_col + col, rows, offset, cols, stride], 1)
