"""`token_logprobs` for CPUs: logits exist as one tile, tokens x vocabulary rows, that stays in the cache.

The softmax is accumulated over tiles ("online softmax", Milakov and Gimelshein 2018, arXiv:1805.02867), so memory does
not grow with the vocabulary, and what lies between the matrix products happens in place. Some logits are kept for the
backward pass, which recomputes the others: with small vocabularies nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.ops.registry import UnavailableError
from megatron_rl.ops.token_logprobs.differentiable import NOTHING, Request, Shard, Softmax, Statistics, apply

TILE_BYTES = 2 * 2**20  # fp32 logits that exist at once: a part of the last-level cache
TILE_TOKENS = 512
KEEP_BYTES = 8 * 2**20  # logits kept for the backward pass


def requires(device_type: str) -> None:
    if device_type != "cpu":
        raise UnavailableError(f"it runs on CPU tensors, not on {device_type}")


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
    """See `interface.token_logprobs`."""
    return apply(CpuKernels(), hidden, weight, targets, request)


@dataclass(frozen=True, slots=True)
class Kept:
    """Logits of one tile, less the maximum of each token that was known at that time."""

    logits: Tensor
    maximum: Tensor


class CpuKernels:
    """One call's work."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], Kept] = {}  # by first token and first row of the tile
        self.tokens = 0  # of the forward pass
        self.height = 1  # tokens of a tile
        self.width = 1  # rows of a tile; the backward pass must cut as the forward pass did

    def statistics(self, shard: Shard, keep: bool) -> Statistics:
        tokens = self.tokens = shard.hidden.shape[0]
        self.height = max(1, min(tokens, shard.request.chunk_tokens or TILE_TOKENS))
        self.width = max(64, TILE_BYTES // (4 * self.height))
        found = Statistics(torch.full((tokens,), NOTHING), *torch.zeros(3, tokens))
        room = KEEP_BYTES if keep else 0
        buffer = Buffer()
        for rows in _spans(shard.weight.shape[0], self.width):
            for span in _spans(tokens, self.height):
                logits = _logits(shard, span, rows, buffer)
                _accumulate(found, logits, shard, span, rows)
                room -= logits.numel() * 4
                if room >= 0:
                    self.kept[span.start, rows.start] = Kept(logits, found.maximum[span].clone())
                    buffer = Buffer()
        return found

    def gradients(
        self, shard: Shard, softmax: Softmax, active: Tensor | None, want_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        hidden, weight = shard.hidden, shard.weight
        grad_hidden = torch.zeros(hidden.shape)
        grad_weight = torch.zeros_like(weight) if want_weight else None
        buffer = Buffer()
        for rows in _spans(weight.shape[0], self.width):
            part = None
            for span in _spans(hidden.shape[0], self.height):
                log_p = self._log_softmax(shard, softmax, span, rows, active, buffer)
                grad = _grad_logits(log_p, shard, softmax, span, rows).to(weight.dtype)
                grad_hidden[span] += product(grad, weight[rows].t())
                if grad_weight is not None:
                    more = product(grad.t(), hidden[span].t()).float()
                    part = more if part is None else part.add_(more)
            if grad_weight is not None and part is not None:
                grad_weight[rows] = part
        return grad_hidden.to(hidden.dtype), grad_weight

    def _log_softmax(
        self, shard: Shard, softmax: Softmax, span: slice, rows: slice, active: Tensor | None, buffer: Buffer
    ) -> Tensor:
        """Log-probabilities of one tile, from kept logits where there are some: a tensor to write to."""
        kept = self.kept.get((span.start, rows.start))
        if kept is not None and active is not None:
            # The tokens have moved: only a tile that held all of them can still be told.
            kept = Kept(kept.logits[active], kept.maximum[active]) if self.tokens <= self.height else None
        if kept is None:
            out = _logits(shard, span, rows, buffer)
            return out.sub_(softmax.maximum[span, None]).sub_(softmax.log_total[span, None])
        shift = (kept.maximum - softmax.maximum[span]) - softmax.log_total[span]
        return kept.logits + shift[:, None]


class Buffer:
    """Memory for one tile, reused by all: allocating tile after tile fragments the heap of glibc."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)

    def take(self, height: int, width: int) -> Tensor:
        if self.flat.numel() < height * width:
            self.flat = torch.empty(height * width)
        return self.flat[: height * width].view(height, width)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T``. In fp32 by oneDNN where torch has it: here 15 % faster than MKL on AMD processors."""
    if left.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return left @ right.t()


def _logits(shard: Shard, span: slice, rows: slice, buffer: Buffer) -> Tensor:
    """Logits of one tile over the temperature, fp32."""
    out = product(shard.hidden[span], shard.weight[rows])
    if out.dtype != torch.float32:
        out = buffer.take(*out.shape).copy_(out)
    return out if shard.request.temperature == 1.0 else out.div_(shard.request.temperature)


def _accumulate(found: Statistics, logits: Tensor, shard: Shard, span: slice, rows: slice) -> None:
    """Add one tile to ``found``; leaves the logits less the maximum so far in ``logits``."""
    held, local = _held(shard.targets[span], rows)
    before, total, target, moment = (field[span] for field in found)
    target[held] = logits[held, local]
    maximum = torch.maximum(before, logits.amax(dim=1))
    shift = before - maximum
    scale = shift.exp()
    weights = logits.sub_(maximum[:, None]).exp()
    if shard.request.with_entropy:
        moment.add_(total * shift).mul_(scale)
    total.mul_(scale).add_(weights.sum(dim=1))
    if shard.request.with_entropy:
        moment.add_(weights.mul_(logits).sum(dim=1))
    before.copy_(maximum)


def _grad_logits(log_p: Tensor, shard: Shard, softmax: Softmax, span: slice, rows: slice) -> Tensor:
    """Gradient of the undivided logits of one tile, in the place of ``log_p`` where possible."""
    held, local = _held(shard.targets[span], rows)
    temperature = shard.request.temperature
    grad_logprob = softmax.grad_logprob[span] / temperature
    if softmax.grad_entropy is None:
        grad = log_p.exp_().mul_(-grad_logprob[:, None])
    else:  # d entropy / d logit = -p (log p + entropy)
        p = log_p.exp()
        grad_entropy = softmax.grad_entropy[span] / temperature
        constant = grad_logprob + grad_entropy * softmax.entropy[span]
        grad = log_p.mul_(grad_entropy[:, None]).add_(constant[:, None]).mul_(p).neg_()
    grad[held, local] += grad_logprob[held]
    return grad


def _held(targets: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Tokens whose target lies in ``rows``, and its number there."""
    local = targets - rows.start
    held = ((local >= 0) & (targets < rows.stop)).nonzero().squeeze(1)
    return held, local[held]


def _spans(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
