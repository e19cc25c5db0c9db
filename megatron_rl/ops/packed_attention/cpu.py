"""`packed_attention` in C++ (csrc/cpu/packed_attention.cpp), float32 without dropout: one call for all segments and
heads. Of the softmax only each row's maximum and sum are kept for the backward pass. OpenMP over segments and key heads
(forward) and over key heads (backward)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cpu as requires

__all__ = ["packed_attention", "requires"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    rotary: Tensor | None,
    scale: float,
    dropout: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `megatron_rl.ops.packed_attention.interface.packed_attention`."""
    if query.dtype != torch.float32 or dropout > 0.0:
        raise ValueError(
            f"packed_attention=cpu computes in float32 without dropout, not {query.dtype} with dropout={dropout}: "
            "leave the implementation unset"
        )
    rule = (scale, window or 0, softcap or 0.0)
    return _PackedAttention.apply(query, key, value, sinks, segments, rotary, rule)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        segments: Tensor,
        rotary: Tensor | None,
        rule: tuple[float, int, float],
    ) -> Tensor:
        rotary = torch.empty(2, 0, 0) if rotary is None else rotary.contiguous()
        sinks = torch.empty(0) if sinks is None else sinks.float().contiguous()
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        segments = segments.contiguous()
        out = torch.empty(*query.shape[:2], value.shape[2])
        statistics = torch.empty(2, *query.shape[:2])
        threads = torch.get_num_threads()
        torch.ops.megatron_rl_cpu.packed_attention(
            query, key, value, rotary, segments, out, *statistics, *rule, sinks, threads
        )
        ctx.save_for_backward(query, key, value, out, statistics, sinks)
        ctx.segments, ctx.rotary, ctx.rule = segments, rotary, rule
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, statistics, sinks = ctx.saved_tensors
        grad_query = torch.empty(query.shape)
        grad_key, grad_value = torch.zeros(key.shape), torch.zeros(value.shape)
        torch.ops.megatron_rl_cpu.packed_attention_grad(
            query,
            key,
            value,
            ctx.rotary,
            ctx.segments,
            out,
            *statistics,
            grad_out.contiguous(),
            grad_query,
            grad_key,
            grad_value,
            *ctx.rule,
            sinks,
            torch.get_num_threads(),
        )
        grad_sinks = None
        if ctx.needs_input_grad[3]:  # a sink has a probability and no value
            maximum, inverse = statistics
            probability = (sinks - maximum).exp() * inverse
            grad_sinks = -(probability * (grad_out * out).sum(-1)).sum(0)
        return grad_query, grad_key, grad_value, grad_sinks, None, None, None
