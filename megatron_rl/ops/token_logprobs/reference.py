"""`token_logprobs` in plain torch, chunk by chunk: the definition of correct, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_rl.ops.token_logprobs.differentiable import NOTHING, Request, Shard, Softmax, Statistics, apply

CHUNK_BYTES = 64 * 2**20  # fp32 logits that exist at once, where the caller does not say


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
    """See `interface.token_logprobs`."""
    return apply(ReferenceKernels(), hidden, weight, targets, request)


class ReferenceKernels:
    """Matrix products in the dtype of the inputs; everything after them in fp32. Keeps nothing."""

    def statistics(self, shard: Shard, keep: bool) -> Statistics:
        weight, request = shard.weight, shard.request
        if weight.shape[0] == 0 or shard.hidden.shape[0] == 0:
            zeros = torch.zeros(shard.hidden.shape[0], dtype=torch.float32, device=weight.device)
            return Statistics(zeros + NOTHING, zeros, zeros, zeros)
        parts = []
        for chunk in _chunks(shard):
            hidden, targets = shard.hidden[chunk], shard.targets[chunk]
            logits = (hidden @ weight.t()).float() / request.temperature
            maximum = logits.amax(dim=-1)
            picked = logits.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
            shifted = logits - maximum[:, None]
            weights = shifted.exp()
            moment = (weights * shifted).sum(dim=-1) if request.with_entropy else torch.zeros_like(maximum)
            parts.append(Statistics(maximum, weights.sum(dim=-1), torch.where(targets >= 0, picked, 0.0), moment))
        return Statistics(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def gradients(
        self, shard: Shard, softmax: Softmax, active: Tensor | None, want_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        weight = shard.weight
        grad_hidden = torch.zeros_like(shard.hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if want_weight else None
        for chunk in _chunks(shard):
            hidden = shard.hidden[chunk]
            grad = _grad_logits(hidden, weight, shard.targets[chunk], softmax, chunk, shard.request.temperature)
            grad = grad.to(hidden.dtype)
            grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _grad_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, softmax: Softmax, chunk: slice, temperature: float
) -> Tensor:
    """Gradient of the undivided logits of one chunk, [tokens, rows] fp32."""
    logits = (hidden @ weight.t()).float() / temperature
    log_p = (logits - softmax.maximum[chunk, None]) - softmax.log_total[chunk, None]
    p = log_p.exp()
    grad_logprob = softmax.grad_logprob[chunk]
    grad = -grad_logprob[:, None] * p
    if softmax.grad_entropy is not None:  # d entropy / d logit = -p (log p + entropy)
        grad -= softmax.grad_entropy[chunk, None] * p * (log_p + softmax.entropy[chunk, None])
    held = (targets >= 0).nonzero().squeeze(1)
    grad[held, targets[held]] += grad_logprob[held]
    return grad / temperature


def _chunks(shard: Shard) -> Iterator[slice]:
    size = shard.request.chunk_tokens or max(16, CHUNK_BYTES // (4 * max(1, shard.weight.shape[0])))
    for start in range(0, shard.hidden.shape[0], size):
        yield slice(start, start + size)
