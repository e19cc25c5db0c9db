"""`swiglu` in C++ (csrc/cpu/swiglu.cpp), float32: one pass each way, and nothing kept but the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cpu as requires

__all__ = ["requires", "swiglu"]


def swiglu(x: Tensor) -> Tensor:
    """See `megatron_rl.ops.swiglu.interface.swiglu`."""
    if x.dtype != torch.float32:
        raise ValueError(f"swiglu=cpu computes in float32, not {x.dtype}: leave the implementation unset")
    return _Swiglu.apply(x)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        torch.ops.megatron_rl_cpu.swiglu(x, out.view(-1, width), torch.get_num_threads())
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad = torch.empty_like(x)
        rows = grad_out.contiguous().view(-1, grad_out.shape[-1])
        torch.ops.megatron_rl_cpu.swiglu_grad(x, rows, grad, torch.get_num_threads())
        return grad
