"""`token_logprobs` in Triton: torch's matrix products, and one pass over each tile between them.

Forward: one program a token folds the tile into the running softmax statistics. Backward: logits become their gradient
in place. Logits are addressed as integers and converted by `ops.triton_numbers`, whose rounding is exact everywhere.
"""

# ruff: noqa: N803  (Triton's constexpr arguments are upper case by convention)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rl.ops.number_types import NUMBER_TYPES
from megatron_rl.ops.token_logprobs.differentiable import LogprobOptions, Softmax, Statistics, apply
from megatron_rl.ops.token_logprobs.tiles import Tile, TiledKernels, Tiling
from megatron_rl.ops.triton_numbers import cast_bits, f32_bits_from, requires

__all__ = ["requires", "token_logprobs"]

BLOCK = 2048  # columns a program holds at once


def token_logprobs(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, options: LogprobOptions
) -> tuple[Tensor, Tensor | None]:
    """See `interface.token_logprobs`."""
    return apply(TritonKernels(), hidden, weight, targets, options)


@triton.jit
def finite(x):
    """-inf becomes -1e30, so that 0 log 0 is 0; NaN stays."""
    return tl.where(x < -1e30, -1e30, x)


@triton.jit
def fold_rows(
    logits, targets, maximum, total, target, moment, width, first_row, temperature,
    TYPE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold one token's row of a tile into its statistics; the grid is (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * width
    largest = tl.load(maximum + token)
    sum_exp = tl.load(total + token)
    sum_moment = tl.load(moment + token)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        bits = f32_bits_from(tl.load(row + columns, mask=inside, other=0), TYPE)
        x = tl.where(inside, bits.to(tl.float32, bitcast=True) / temperature, -1e30)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        shift = largest - larger
        weights = tl.where(inside, tl.exp(x - larger), 0.0)
        if ENTROPY:
            sum_moment = (sum_moment + sum_exp * shift) * tl.exp(shift) + tl.sum(weights * finite(x - larger), axis=0)
        sum_exp = sum_exp * tl.exp(shift) + tl.sum(weights, axis=0)
        largest = larger
    tl.store(maximum + token, largest)
    tl.store(total + token, sum_exp)
    tl.store(moment + token, sum_moment)
    local = tl.load(targets + token) - first_row
    held = (local >= 0) & (local < width)
    picked = f32_bits_from(tl.load(row + local, mask=held, other=0), TYPE).to(tl.float32, bitcast=True)
    tl.store(target + token, picked / temperature, mask=held)


@triton.jit
def gradient_rows(
    logits, targets, maximum, log_total, entropy, grad_logprob, grad_entropy, width, first_row, temperature,
    TYPE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits of one token and one block of columns become their gradient; the grid is (tokens, blocks)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = logits + token * width + columns
    x = f32_bits_from(tl.load(place, mask=inside, other=0), TYPE).to(tl.float32, bitcast=True) / temperature
    log_p = (x - tl.load(maximum + token)) - tl.load(log_total + token)
    p = tl.exp(log_p)
    upstream = tl.load(grad_logprob + token) / temperature
    grad = -upstream * p
    if ENTROPY:  # d entropy / d logit = -p (log p + entropy)
        grad -= tl.load(grad_entropy + token) / temperature * p * (finite(log_p) + tl.load(entropy + token))
    local = tl.load(targets + token) - first_row
    grad = tl.where(columns == local, grad + upstream, grad)
    tl.store(place, cast_bits(grad.to(tl.int32, bitcast=True), 1, TYPE), mask=inside)


class TritonKernels(TiledKernels):
    """Tiles large enough to keep a GPU's matrix units busy."""

    tiling = Tiling(tile_bytes=512 * 2**20, tile_tokens=8192, keep_bytes=256 * 2**20, keep_half_bytes=128 * 2**20)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right.t()

    def accumulate(self, found: Statistics, logits: Tensor, tile: Tile, with_entropy: bool) -> None:
        tokens, width = logits.shape
        fold_rows[(tokens,)](
            integers(logits), tile.targets, *found, width, tile.rows.start, tile.temperature,
            NUMBER_TYPES[logits.dtype], with_entropy, BLOCK, num_warps=8,
        )  # fmt: skip

    def gradient(self, logits: Tensor, tile: Tile, softmax: Softmax) -> Tensor:
        tokens, width = logits.shape
        with_entropy = softmax.grad_entropy is not None
        grads = [x if x is None else x.contiguous() for x in (softmax.grad_logprob, softmax.grad_entropy)]
        gradient_rows[(tokens, triton.cdiv(width, BLOCK))](
            integers(logits), tile.targets, softmax.maximum, softmax.log_total, softmax.entropy,
            grads[0], grads[1] if with_entropy else grads[0], width, tile.rows.start, tile.temperature,
            NUMBER_TYPES[logits.dtype], with_entropy, BLOCK, num_warps=8,
        )  # fmt: skip
        return logits


def integers(logits: Tensor) -> Tensor:
    """The same memory as integers, which `triton_numbers` converts exactly."""
    return logits.view(torch.int32 if logits.dtype == torch.float32 else torch.int16)
