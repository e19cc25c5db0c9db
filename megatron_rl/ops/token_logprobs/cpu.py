"""`token_logprobs` for CPUs: tiles that stay in the cache, in-place arithmetic, oneDNN products."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.registry import UnavailableError
from megatron_rl.ops.token_logprobs.differentiable import Request, Softmax, Statistics, apply
from megatron_rl.ops.token_logprobs.tiles import Tile, TiledKernels, Tiling


def requires(device_type: str) -> None:
    if device_type != "cpu":
        raise UnavailableError(f"it runs on CPU tensors, not on {device_type}")


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
    """See `interface.token_logprobs`."""
    return apply(CpuKernels(), hidden, weight, targets, request)


class CpuKernels(TiledKernels):
    """Products in the dtype of the inputs, the rest in fp32."""

    tiling = Tiling(tile_bytes=4 * 2**20, tile_tokens=2048, keep_bytes=12 * 2**20, keep_half_bytes=64 * 2**20)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        # In fp32 oneDNN is about 15 % faster than MKL on AMD processors; eager torch would take MKL.
        if left.dtype == torch.float32 and torch.backends.mkldnn.is_available() and left.numel() and right.numel():
            return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return left @ right.t()

    def accumulate(self, found: Statistics, logits: Tensor, tile: Tile, with_entropy: bool) -> None:
        maximum, total, target, moment = found
        wide = logits.float() if tile.temperature == 1.0 else logits.float() / tile.temperature
        held, local = _held(tile)
        target[held] = wide[held, local]
        larger = torch.maximum(maximum, wide.amax(dim=1))
        shift = maximum - larger
        scale = shift.exp()
        # The product's own memory may be kept for the backward pass; everything else here is ours to overwrite.
        shifted = wide.sub(larger[:, None]) if wide is logits else wide.sub_(larger[:, None])
        if with_entropy:
            weights = shifted.exp()
            moment.add_(total * shift).mul_(scale)
            total.mul_(scale).add_(weights.sum(dim=1))
            moment.add_(weights.mul_(shifted).sum(dim=1))
        else:
            total.mul_(scale).add_(shifted.exp_().sum(dim=1))
        maximum.copy_(larger)

    def gradient(self, logits: Tensor, tile: Tile, softmax: Softmax) -> Tensor:
        temperature = tile.temperature
        log_p = logits.float() if temperature == 1.0 else logits.float().div_(temperature)
        log_p.sub_(softmax.maximum[:, None]).sub_(softmax.log_total[:, None])
        grad_logprob = softmax.grad_logprob / temperature
        if softmax.grad_entropy is None:
            grad = log_p.exp_().mul_(-grad_logprob[:, None])
        else:  # d entropy / d logit = -p (log p + entropy)
            p = log_p.exp()
            grad_entropy = softmax.grad_entropy / temperature
            constant = grad_logprob + grad_entropy * softmax.entropy
            grad = log_p.mul_(grad_entropy[:, None]).add_(constant[:, None]).mul_(p).neg_()
        held, local = _held(tile)
        grad[held, local] += grad_logprob[held]
        return grad.to(logits.dtype)


def _held(tile: Tile) -> tuple[Tensor, Tensor]:
    """Tokens of the tile whose target lies in its rows, and the target's number there."""
    local = tile.targets - tile.rows.start
    held = ((local >= 0) & (tile.targets < tile.rows.stop)).nonzero().squeeze(1)
    return held, local[held]
