"""`span_checksum` in torch, int64 arithmetic that wraps. The definition of correct, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.copy_spans.reference import copy_spans

CHUNK = 1 << 20  # words widened to int64 at a time: bounds the temporary memory to some 16 MB
STEP = 0x9E3779B97F4A7C15 - 2**64
COLUMN_SEED = 0xD1B54A32D192ED03 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


@torch.no_grad()
def span_checksum(tensors: list[Tensor], spans: Tensor, num_slots: int, as_dtype: torch.dtype | None) -> Tensor:
    """See `megatron_rl.ops.span_checksum.interface.span_checksum`; without ``as_dtype``, units are words."""
    device = tensors[0].device
    sums = torch.zeros(num_slots, dtype=torch.int64, device=device)
    widest = int(spans[:, 7].max())
    steps = torch.arange(widest, device=device) * STEP
    for index, slot, key, logical_row, logical_col, offset, rows, cols, stride in spans.tolist():
        if rows == 0 or cols == 0:
            continue
        col_keys = _mix(steps[:cols] + _wrap(COLUMN_SEED + logical_col * STEP)) | 1
        row_keys = _mix(torch.arange(rows, device=device) * STEP + _wrap(key + logical_row * STEP)) | 1
        at = offset + tensors[index].storage_offset()
        step = max(1, CHUNK // cols)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            part = tensors[index].as_strided((count, cols), (stride, 1), at + first * stride)
            dots = ((_words(part, as_dtype) + 1) * col_keys).sum(1)
            sums[slot] += (dots * row_keys[first : first + count]).sum()
    return sums


def _words(part: Tensor, as_dtype: torch.dtype | None) -> Tensor:
    """[rows, cols] int64 in [0, 2^16)."""
    if as_dtype is not None:
        dense = part.contiguous()
        part = torch.empty(dense.shape, dtype=as_dtype, device=dense.device)
        whole = torch.tensor([[0, 0, 0, 0, 1, dense.numel(), 0, 0]])
        copy_spans([dense], [part], whole)
        part = part.view(torch.int16)
    return part.long() & 0xFFFF if part.dtype == torch.int16 else part.long()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _shift(x, 27)) * MULTIPLIERS[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    """The int64 that is congruent to ``value`` modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63
