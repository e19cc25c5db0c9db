"""`block_quantize` in torch, one row of blocks at a time. The definition of correct, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.block_quantize.interface import BLOCK, empty_result

LARGEST = 448.0  # of e4m3fn
SMALLEST_AMAX = 1e-12
NAN_CODE = 0x7F


@torch.no_grad()
def block_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `megatron_rl.ops.block_quantize.interface.block_quantize`."""
    codes, scales = empty_result(x)
    padding = -x.shape[1] % BLOCK
    for block_row in range(scales.shape[0]):
        rows = slice(block_row * BLOCK, (block_row + 1) * BLOCK)
        wide = torch.nn.functional.pad(x[rows].float(), (0, padding)).view(-1, scales.shape[1], BLOCK)
        scale = wide.abs().amax((0, 2)).clamp_min(SMALLEST_AMAX) / LARGEST  # amax and clamp carry NaN
        scales[block_row] = torch.where(scale.isnan(), torch.nan, scale)  # one NaN, whatever the payload
        scaled = (wide / scale[:, None]).clamp(-LARGEST, LARGEST).view(wide.shape[0], -1)[:, : x.shape[1]]
        codes[rows] = scaled.to(torch.float8_e4m3fn)
        if bool(scale.isfinite().all()):
            continue
        codes.view(torch.uint8)[rows].masked_fill_(scaled.isnan(), NAN_CODE)
    return codes, scales
