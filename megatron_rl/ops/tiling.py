"""Cutting rectangles into tiles of similar size: the work list of one accelerator launch.

Tables of copies and checksums hold a few huge rectangles and thousands of small ones; one program or block per tile
keeps the machine busy either way. Columns of a tile table: `TILE_COLUMNS`, as csrc/include/tables.h reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_COLUMNS = ("item", "row", "col", "rows", "cols")


def tile_table(rows: Tensor, cols: Tensor, numel: int, widest: int, highest: int = 2**31) -> Tensor:
    """[num_tiles, 5] int64: tiles that cover each of the n rectangles exactly once; empty rectangles have none.

    Args:
        rows, cols: [n] int64, the sizes of the rectangles.
        numel: elements per tile, at most; a tile is as wide as the rectangle, up to ``widest``, and then as high as
            this allows (at least one row).
        widest: columns per tile, at most.
        highest: rows per tile, at most.
    """
    tile_cols = cols.clamp(1, widest)
    tile_rows = (numel // tile_cols).clamp(1, highest)
    across, down = -(-cols // tile_cols), -(-rows // tile_rows)
    counts = across * down
    item = torch.repeat_interleave(torch.arange(len(counts)), counts)
    index = torch.arange(len(item)) - (counts.cumsum(0) - counts)[item]
    row = index // across[item] * tile_rows[item]
    col = index % across[item] * tile_cols[item]
    height, width = (rows[item] - row).minimum(tile_rows[item]), (cols[item] - col).minimum(tile_cols[item])
    return torch.stack([item, row, col, height, width], 1)


def joined_rows(jobs: Tensor) -> Tensor:
    """A copy of a `copy_spans` table whose jobs between dense rectangles became one long row each."""
    jobs = jobs.clone()
    rows, cols = jobs[:, 4].clone(), jobs[:, 5].clone()
    dense = (jobs[:, 6] == cols) & (jobs[:, 7] == cols) & (rows > 0)
    jobs[:, 5] = torch.where(dense, rows * cols, cols)
    jobs[:, 4] = torch.where(dense, 1, rows)
    return jobs


def addresses(tensors: list[Tensor], device: torch.device) -> Tensor:
    """[n] int64 on ``device``: where each tensor's memory begins."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64).to(device)
