"""The contract of `add_rms_norm`: ``hidden += delta``, then RMSNorm (arXiv 1910.07467) of the sum. No gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.selection import choose


def add_rms_norm(
    hidden: Tensor, delta: Tensor, weight: Tensor, eps: float, *, implementation: str | None = None
) -> Tensor:
    """``h / sqrt(mean(h ** 2) + eps) * weight`` of ``h = hidden + delta``, ``[rows, cols]``; ``hidden`` becomes h.

    Args:
        hidden: ``[rows, cols]``, overwritten.
        delta: the same shape.
        weight: ``[cols]``.
        eps: added to the mean square.
        implementation: forces one; None takes the best available: "cpu" for float32 only, else "reference".

    Raises:
        ValueError: shapes or dtypes do not fit, or a tensor is not contiguous.
        UnavailableError: the forced implementation cannot run here.
    """
    tensors = (hidden, delta, weight)
    if hidden.dim() != 2 or delta.shape != hidden.shape or weight.shape != hidden.shape[1:]:
        raise ValueError(f"expected [rows, cols] twice and [cols], got {[list(tensor.shape) for tensor in tensors]}")
    if {tensor.dtype for tensor in tensors} != {hidden.dtype} or not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("hidden, delta and weight must be contiguous and of one dtype")
    if implementation is None and hidden.dtype != torch.float32:
        implementation = "reference"
    return choose("add_rms_norm", hidden.device.type, implementation)(hidden, delta, weight, eps)
