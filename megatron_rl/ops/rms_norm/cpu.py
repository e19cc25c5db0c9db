"""`rms_norm` in C++ (csrc/cpu/rms_norm.cpp), float32: one pass each way, and one number a row kept for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cpu as requires

__all__ = ["requires", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `megatron_rl.ops.rms_norm.interface.rms_norm`."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise ValueError(
            f"rms_norm=cpu computes in float32, not {x.dtype} and {weight.dtype}: leave the implementation unset"
        )
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, weight = x.contiguous().view(-1, x.shape[-1]), weight.contiguous()
        out, inverse = torch.empty_like(rows), rows.new_empty(rows.shape[0])
        torch.ops.megatron_rl_cpu.rms_norm(rows, weight, out, inverse, eps, torch.get_num_threads())
        ctx.save_for_backward(rows, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, inverse = ctx.saved_tensors
        grad, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        outer = grad_out.contiguous().view(rows.shape)
        torch.ops.megatron_rl_cpu.rms_norm_grad(
            rows, weight, inverse, outer, grad, grad_weight, torch.get_num_threads()
        )
        return grad.view(grad_out.shape), grad_weight, None
