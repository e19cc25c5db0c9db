"""`add_rms_norm` in C++ (csrc/cpu/add_rms_norm.cpp), float32: torch's own takes seven passes on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cpu as requires

__all__ = ["add_rms_norm", "requires"]


def add_rms_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `megatron_rl.ops.add_rms_norm.interface.add_rms_norm`."""
    if hidden.dtype != torch.float32:
        raise ValueError(f"add_rms_norm=cpu computes in float32, not {hidden.dtype}: leave the implementation unset")
    out = torch.empty_like(hidden)
    torch.ops.megatron_rl_cpu.add_rms_norm(hidden, delta, weight, out, eps, torch.get_num_threads())
    return out
