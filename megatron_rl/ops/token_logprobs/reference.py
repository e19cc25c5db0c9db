"""`token_logprobs` in plain torch, chunk by chunk: the definition of correct, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_rl.ops.token_logprobs.differentiable import (
    NOTHING,
    Request,
    Shard,
    Softmax,
    Statistics,
    apply,
    nothing,
)

CHUNK_BYTES = 64 * 2**20  # fp32 logits that exist at once, where the caller does not say


def token_logprobs(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, request: Request
) -> tuple[Tensor, Tensor | None]:
    """See `interface.token_logprobs`."""
    return apply(ReferenceKernels(), hidden, weight, targets, request)


class ReferenceKernels:
    """Matrix products in the dtype of the inputs; everything after them in fp32. Keeps nothing."""

    def statistics(self, shard: Shard, keep: bool) -> Statistics:
        weight, request = shard.weight, shard.request
        if weight.shape[0] == 0 or shard.hidden.shape[0] == 0:
            return nothing(shard.hidden.shape[0], weight.device)
        return _joined(
            _statistics(shard.hidden[chunk] @ weight.t(), shard.targets[chunk], request)
            for chunk in _chunks(shard.hidden.shape[0], weight.shape[0], request)
        )

    def gradients(
        self, shard: Shard, softmax: Softmax, active: Tensor | None, want_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        weight, request = shard.weight, shard.request
        grad_hidden = torch.zeros_like(shard.hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if want_weight else None
        for chunk in _chunks(shard.hidden.shape[0], weight.shape[0], request):
            hidden = shard.hidden[chunk]
            grad = _grad_logits(hidden @ weight.t(), shard.targets[chunk], softmax.select(chunk), request)
            grad = grad.to(hidden.dtype)
            grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)

    def logit_statistics(self, logits: Tensor, targets: Tensor, request: Request) -> Statistics:
        chunks = _chunks(logits.shape[0], logits.shape[1], request)
        return _joined(_statistics(logits[chunk], targets[chunk], request) for chunk in chunks)

    def logit_gradients(self, logits: Tensor, targets: Tensor, softmax: Softmax, request: Request) -> Tensor:
        for chunk in _chunks(logits.shape[0], logits.shape[1], request):
            logits[chunk] = _grad_logits(logits[chunk], targets[chunk], softmax.select(chunk), request).to(logits.dtype)
        return logits


def _joined(parts: Iterable[Statistics]) -> Statistics:
    return Statistics(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _statistics(undivided: Tensor, targets: Tensor, request: Request) -> Statistics:
    """Of one chunk of logits, [tokens, rows]."""
    logits = undivided.float() / request.temperature
    maximum = logits.amax(dim=-1).clamp_min(NOTHING)  # this rank's logits may all be -inf
    picked = logits.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
    shifted = logits - maximum[:, None]
    weights = shifted.exp()
    moment = torch.zeros_like(maximum)
    if request.with_entropy:
        moment = (weights * shifted.clamp_min(NOTHING)).sum(dim=-1)  # 0 log 0 = 0
    return Statistics(maximum, weights.sum(dim=-1), torch.where(targets >= 0, picked, 0.0), moment)


def _grad_logits(undivided: Tensor, targets: Tensor, softmax: Softmax, request: Request) -> Tensor:
    """Gradient of the undivided logits of one chunk, [tokens, rows] fp32."""
    logits = undivided.float() / request.temperature
    log_p = (logits - softmax.maximum[:, None]) - softmax.log_total[:, None]
    p = log_p.exp()
    grad = -softmax.grad_logprob[:, None] * p
    if softmax.grad_entropy is not None:  # d entropy / d logit = -p (log p + entropy), and 0 log 0 = 0
        grad -= softmax.grad_entropy[:, None] * p * (log_p.clamp_min(NOTHING) + softmax.entropy[:, None])
    held = (targets >= 0).nonzero().squeeze(1)
    grad[held, targets[held]] += softmax.grad_logprob[held]
    return grad / request.temperature


def _chunks(tokens: int, rows: int, request: Request) -> Iterator[slice]:
    size = request.chunk_tokens or max(16, CHUNK_BYTES // (4 * max(1, rows)))
    for start in range(0, tokens, size):
        yield slice(start, start + size)
