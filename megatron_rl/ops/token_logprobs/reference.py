"""`token_logprobs` in plain torch, chunk by chunk: the definition of correct, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_rl.ops.token_logprobs.differentiable import (
    NOTHING,
    LogprobInputs,
    LogprobOptions,
    Softmax,
    Statistics,
    apply,
    nothing,
)

CHUNK_BYTES = 64 * 2**20  # fp32 logits that exist at once, where the caller does not say


def token_logprobs(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, options: LogprobOptions
) -> tuple[Tensor, Tensor | None]:
    """See `interface.token_logprobs`."""
    return apply(ReferenceKernels(), hidden, weight, targets, options)


class ReferenceKernels:
    """Matrix products in the dtype of the inputs; everything after them in fp32. Keeps nothing."""

    def statistics(self, inputs: LogprobInputs, keep: bool) -> Statistics:
        weight, options = inputs.weight, inputs.options
        if weight.shape[0] == 0 or inputs.hidden.shape[0] == 0:
            return nothing(inputs.hidden.shape[0], weight.device)
        return _joined(
            _statistics(options.capped(inputs.hidden[chunk] @ weight.t()), inputs.targets[chunk], options)
            for chunk in _chunks(inputs.hidden.shape[0], weight.shape[0], options)
        )

    def gradients(
        self, inputs: LogprobInputs, softmax: Softmax, active: Tensor | None, want_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        weight, options = inputs.weight, inputs.options
        grad_hidden = torch.zeros_like(inputs.hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if want_weight else None
        for chunk in _chunks(inputs.hidden.shape[0], weight.shape[0], options):
            hidden = inputs.hidden[chunk]
            logits = options.capped(hidden @ weight.t())
            grad = _grad_logits(logits, inputs.targets[chunk], softmax.select(chunk), options)
            slope = options.through_cap(logits.float())
            grad = (grad if slope is None else grad * slope).to(hidden.dtype)
            grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)

    def logit_statistics(self, logits: Tensor, targets: Tensor, options: LogprobOptions) -> Statistics:
        chunks = _chunks(logits.shape[0], logits.shape[1], options)
        return _joined(_statistics(logits[chunk], targets[chunk], options) for chunk in chunks)

    def logit_gradients(self, logits: Tensor, targets: Tensor, softmax: Softmax, options: LogprobOptions) -> Tensor:
        for chunk in _chunks(logits.shape[0], logits.shape[1], options):
            logits[chunk] = _grad_logits(logits[chunk], targets[chunk], softmax.select(chunk), options).to(logits.dtype)
        return logits


def _joined(parts: Iterable[Statistics]) -> Statistics:
    return Statistics(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _statistics(undivided: Tensor, targets: Tensor, options: LogprobOptions) -> Statistics:
    """Of one chunk of logits, [tokens, rows]."""
    logits = undivided.float() / options.temperature
    maximum = logits.amax(dim=-1).clamp_min(NOTHING)  # this rank's logits may all be -inf
    picked = logits.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
    shifted = logits - maximum[:, None]
    weights = shifted.exp()
    moment = torch.zeros_like(maximum)
    if options.with_entropy:
        moment = (weights * shifted.clamp_min(NOTHING)).sum(dim=-1)  # 0 log 0 = 0
    return Statistics(maximum, weights.sum(dim=-1), torch.where(targets >= 0, picked, 0.0), moment)


def _grad_logits(undivided: Tensor, targets: Tensor, softmax: Softmax, options: LogprobOptions) -> Tensor:
    """Gradient of the undivided logits of one chunk, [tokens, rows] fp32."""
    logits = undivided.float() / options.temperature
    log_p = (logits - softmax.maximum[:, None]) - softmax.log_total[:, None]
    p = log_p.exp()
    grad = -softmax.grad_logprob[:, None] * p
    if softmax.grad_entropy is not None:  # d entropy / d logit = -p (log p + entropy), and 0 log 0 = 0
        grad -= softmax.grad_entropy[:, None] * p * (log_p.clamp_min(NOTHING) + softmax.entropy[:, None])
    held = (targets >= 0).nonzero().squeeze(1)
    grad[held, targets[held]] += softmax.grad_logprob[held]
    return grad / options.temperature


def _chunks(tokens: int, rows: int, options: LogprobOptions) -> Iterator[slice]:
    size = options.chunk_tokens or max(16, CHUNK_BYTES // (4 * max(1, rows)))
    for start in range(0, tokens, size):
        yield slice(start, start + size)
