"""`copy_spans` in torch: one strided view and one `copy_` per job. The definition of correct, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

QUIET_NAN = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@torch.no_grad()
def copy_spans(sources: list[Tensor], destinations: list[Tensor], jobs: Tensor) -> None:
    """See `megatron_rl.ops.copy_spans.interface.copy_spans`."""
    casts = sources[0].dtype != destinations[0].dtype
    for src_index, dst_index, src_offset, dst_offset, rows, cols, src_stride, dst_stride in jobs.tolist():
        if rows == 0 or cols == 0:
            continue
        if src_stride == cols == dst_stride:  # one long row lets copy_ take its fastest path
            rows, cols = 1, rows * cols
        target = _rectangle(destinations[dst_index], dst_offset, rows, cols, dst_stride)
        target.copy_(_rectangle(sources[src_index], src_offset, rows, cols, src_stride))
        if casts:
            _write_quiet_nans(target)


def _rectangle(tensor: Tensor, offset: int, rows: int, cols: int, stride: int) -> Tensor:
    start = tensor.storage_offset() + offset
    return tensor.as_strided((cols,), (1,), start) if rows == 1 else tensor.as_strided((rows, cols), (stride, 1), start)


def _write_quiet_nans(target: Tensor) -> None:
    """torch's own NaN bits depend on the device and on whether the vectorised loop or its tail met the element."""
    if bool(target.amax().isnan()):  # amax propagates NaN: one read, no temporary
        target.view(BITS[target.dtype]).masked_fill_(target.isnan(), QUIET_NAN[target.dtype])
