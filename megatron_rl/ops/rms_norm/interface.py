"""The contract of `rms_norm`: ``x / sqrt(mean(x ** 2) + eps) * weight`` (arXiv 1910.07467), computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.selection import choose


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, implementation: str | None = None) -> Tensor:
    """``[..., cols] -> [..., cols]`` in the dtype of ``x``; differentiable.

    The cast back to the input's dtype comes after the weight, as in TransformerEngine; Hugging Face casts before it,
    which differs in bf16 by one rounding.

    Args:
        x: fp32, bf16 or fp16.
        weight: ``[cols]``.
        eps: added to the mean square.
        implementation: forces one; None takes the best available: "cpu" for float32 only, else "reference".

    Raises:
        ValueError: shapes do not fit.
        UnavailableError: the forced implementation cannot run here.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {list(weight.shape)} does not fit x {list(x.shape)}: expected its last dimension")
    if implementation is None and (x.dtype != torch.float32 or weight.dtype != torch.float32):
        implementation = "reference"
    out: Tensor = choose("rms_norm", x.device.type, implementation)(x, weight, eps)
    return out
