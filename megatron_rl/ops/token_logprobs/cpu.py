"""`token_logprobs` for CPUs: oneDNN products of tiles that stay in the cache, and between them one pass over a tile
each way in C++ (csrc/cpu/token_logprobs.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.extension import requires_cpu as requires
from megatron_rl.ops.number_types import NUMBER_TYPES
from megatron_rl.ops.token_logprobs.differentiable import LogprobOptions, Softmax, Statistics, apply
from megatron_rl.ops.token_logprobs.tiles import Tile, TiledKernels, Tiling

__all__ = ["requires", "token_logprobs"]


def token_logprobs(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, options: LogprobOptions
) -> tuple[Tensor, Tensor | None]:
    """See `interface.token_logprobs`."""
    return apply(CpuKernels(), hidden, weight, targets, options)


class CpuKernels(TiledKernels):
    """Products in the dtype of the inputs, the rest in fp32."""

    tiling = Tiling(tile_bytes=4 * 2**20, tile_tokens=2048, keep_bytes=12 * 2**20, keep_half_bytes=64 * 2**20)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        # In fp32 oneDNN is about 15 % faster than MKL on AMD processors; eager torch would take MKL.
        if left.dtype == torch.float32 and torch.backends.mkldnn.is_available() and left.numel() and right.numel():
            return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return left @ right.t()

    def accumulate(self, found: Statistics, logits: Tensor, tile: Tile, with_entropy: bool) -> None:
        torch.ops.megatron_rl_cpu.fold_logits(
            logits,
            tile.targets,
            *found,
            tile.rows.start,
            tile.temperature,
            with_entropy,
            NUMBER_TYPES[logits.dtype],
            torch.get_num_threads(),
        )

    def gradient(self, logits: Tensor, tile: Tile, softmax: Softmax) -> Tensor:
        torch.ops.megatron_rl_cpu.grad_logits(
            logits,
            tile.targets,
            softmax.maximum,
            softmax.log_total,
            softmax.grad_logprob.contiguous(),
            softmax.maximum[:0] if softmax.grad_entropy is None else softmax.grad_entropy.contiguous(),
            softmax.entropy,
            tile.rows.start,
            tile.temperature,
            NUMBER_TYPES[logits.dtype],
            torch.get_num_threads(),
        )
        return logits
