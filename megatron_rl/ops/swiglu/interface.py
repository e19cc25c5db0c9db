"""The contract of `swiglu`: ``silu(gate) * up`` (Shazeer 2020, arXiv:2002.05202), of one tensor that holds both."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.selection import choose


def swiglu(x: Tensor, *, implementation: str | None = None) -> Tensor:
    """``[..., 2 * width] -> [..., width]``: gates are the first half of the last dimension; differentiable.

    Args:
        x: fp32, bf16 or fp16.
        implementation: forces one; None takes the best available: "cpu" for float32 only, else "reference".

    Raises:
        ValueError: the last dimension is odd.
        UnavailableError: the forced implementation cannot run here.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x {list(x.shape)}: the last dimension must hold gates and as many others")
    if implementation is None and x.dtype != torch.float32:
        implementation = "reference"
    out: Tensor = choose("swiglu", x.device.type, implementation)(x)
    return out
