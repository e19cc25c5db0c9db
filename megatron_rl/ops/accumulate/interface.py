"""The contract of `accumulate` and its edge checks.

    out = (((parts[0] + parts[1]) + parts[2]) + ...)        each sum rounded to fp32, the last one to out's dtype

The order is part of the contract: every implementation gives the same bits, so a reduction does not depend on where it
was computed (`collectives`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.ops.selection import choose

DTYPES = (torch.float32, torch.bfloat16)


def accumulate(parts: Sequence[Tensor], out: Tensor, *, implementation: str | None = None) -> Tensor:
    """Write the sum of ``parts`` into ``out`` and return it.

    Args:
        parts: at least one contiguous tensor, all of one dtype (fp32 or bf16), device and number of elements.
        out: contiguous, fp32 or bf16, as many elements; it may be one of the parts, but not overlap one otherwise.
        implementation: forces one ("reference", "cpu", "triton", "cuda"); None takes the best available.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or memory that is not contiguous.
        UnavailableError: the forced implementation cannot run here.
    """
    if not parts:
        raise ValueError("accumulate needs at least one part")
    tensors = [*parts, out]
    if len({part.dtype for part in parts}) != 1 or any(tensor.dtype not in DTYPES for tensor in tensors):
        raise ValueError(
            "expected parts of one dtype, and that and out's one of float32, bfloat16; got parts "
            f"{sorted({str(part.dtype) for part in parts})} and out {out.dtype}"
        )
    if len({(tensor.numel(), tensor.device) for tensor in tensors}) != 1:
        raise ValueError(
            f"parts and out must have one number of elements and device, got {[t.numel() for t in tensors]} on "
            f"{sorted({str(t.device) for t in tensors})}"
        )
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("parts and out must be contiguous")
    if out.numel():
        choose("accumulate", out.device.type, implementation)(parts, out)
    return out
