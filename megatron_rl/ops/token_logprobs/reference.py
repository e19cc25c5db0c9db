"""`token_logprobs` in plain torch, chunk by chunk: the definition of correct, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.token_logprobs.differentiable import NOTHING, Request, Softmax, Statistics, apply

CHUNK_BYTES = 64 * 2**20  # fp32 logits that exist at once, where the caller does not say


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
    """See `interface.token_logprobs`."""
    return apply(ReferenceKernels(), hidden, weight, targets, request)


class ReferenceKernels:
    """Matrix products in the dtype of the inputs; everything after them in fp32."""

    def statistics(self, hidden: Tensor, weight: Tensor, targets: Tensor, request: Request) -> Statistics:
        if weight.shape[0] == 0:
            zeros = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
            return Statistics(zeros + NOTHING, zeros, zeros, zeros)
        parts = []
        for chunk, chunk_targets in _chunks(hidden, weight, request, targets):
            logits = (chunk @ weight.t()).float() / request.temperature
            maximum = logits.amax(dim=-1)
            picked = logits.gather(1, chunk_targets.clamp_min(0)[:, None]).squeeze(1)
            target = torch.where(chunk_targets >= 0, picked, 0.0)
            shifted = logits - maximum[:, None]
            weights = shifted.exp()
            moment = (weights * shifted).sum(dim=-1) if request.with_entropy else torch.zeros_like(maximum)
            parts.append(Statistics(maximum, weights.sum(dim=-1), target, moment))
        return Statistics(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def gradients(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, softmax: Softmax, request: Request
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        fields = [targets, *(field for field in softmax if field is not None)]
        start = 0
        for part in _chunks(hidden, weight, request, *fields):
            chunk, chunk_targets, maximum, log_total, entropy, grad_logprob, *rest = part
            logits = (chunk @ weight.t()).float() / request.temperature
            log_p = (logits - maximum[:, None]) - log_total[:, None]
            p = log_p.exp()
            grad = -grad_logprob[:, None] * p
            if rest:  # d entropy / d logit = -p (log p + entropy)
                grad -= rest[0][:, None] * p * (log_p + entropy[:, None])
            held = (chunk_targets >= 0).nonzero().squeeze(1)
            grad[held, chunk_targets[held]] += grad_logprob[held]
            grad = (grad / request.temperature).to(hidden.dtype)
            grad_hidden[start : start + len(chunk)] = grad @ weight
            grad_weight += grad.t() @ chunk
            start += len(chunk)
        return grad_hidden, grad_weight.to(weight.dtype)


def _chunks(hidden: Tensor, weight: Tensor, request: Request, *fields: Tensor) -> zip[tuple[Tensor, ...]]:
    """``hidden`` and per-token ``fields``, split along tokens alike."""
    size = request.chunk_tokens or max(16, CHUNK_BYTES // (4 * max(1, weight.shape[0])))
    return zip(*(tensor.split(size) for tensor in (hidden, *fields)), strict=True)
