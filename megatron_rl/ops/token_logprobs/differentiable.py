"""What all implementations of `token_logprobs` share: the merge over vocabulary shards, and the autograd function.

An implementation supplies `Kernels`: statistics of each token over this rank's rows, and gradients given the merged
log-sum-exp. The softmax is merged as in Milakov and Gimelshein 2018 (arXiv:1805.02867): two small all-reduces in the
forward pass, none in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

NOTHING = -1e30  # the maximum over no rows: finite, so that merging never meets inf - inf


@dataclass(frozen=True, slots=True)
class Request:
    """The options of one call, as the interface checked them."""

    vocab_start: int
    vocab_size: int
    temperature: float
    group: dist.ProcessGroup | None
    with_entropy: bool
    chunk_tokens: int | None

    def real_rows(self, weight: Tensor) -> Tensor:
        """The rows of ``weight`` that are not padding."""
        return weight[: max(0, min(self.vocab_size - self.vocab_start, weight.shape[0]))]


class Statistics(NamedTuple):
    """Of each token over this rank's rows, ``[tokens]`` fp32, logits already divided by the temperature."""

    maximum: Tensor  # NOTHING where there are no rows
    total: Tensor  # sum of exp(logit - maximum)
    target: Tensor  # logit of the target; 0 where another rank holds it
    moment: Tensor  # sum of exp(logit - maximum) * (logit - maximum); 0 without entropy


class Kernels(Protocol):
    """Local work of one implementation. ``targets`` are row numbers of ``weight``, -1 = held by another rank."""

    def statistics(self, hidden: Tensor, weight: Tensor, targets: Tensor, request: Request) -> Statistics: ...

    def gradients(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, softmax: Softmax, request: Request
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``hidden`` (this rank's part) and of ``weight``, in their dtypes."""
        ...


class Softmax(NamedTuple):
    """What the backward pass needs of each token, ``[tokens]`` fp32."""

    maximum: Tensor  # largest logit of the whole vocabulary
    log_total: Tensor  # log of the sum of exp(logit - maximum) over the whole vocabulary
    entropy: Tensor  # 0 without entropy
    grad_logprob: Tensor
    grad_entropy: Tensor | None  # None: no gradient flows through entropies

    def select(self, index: Tensor) -> Softmax:
        rest = None if self.grad_entropy is None else self.grad_entropy[index]
        return Softmax(*(field[index] for field in self[:4]), grad_entropy=rest)


def apply(
    kernels: Kernels, hidden: Tensor, weight: Tensor, targets: Tensor, request: Request
) -> tuple[Tensor, Tensor | None]:
    """Run ``kernels`` on one call of the interface."""
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, request, kernels)
    return logprobs, entropy if request.with_entropy else None


class Merged(NamedTuple):
    """Of each token over all vocabulary shards, ``[tokens]`` fp32."""

    logprobs: Tensor
    entropy: Tensor
    maximum: Tensor
    log_total: Tensor


def merge(local: Statistics, request: Request) -> Merged:
    """One all-reduce for the maxima and one for the sums; none without a group."""
    maximum, total, target, moment = local
    if request.group is not None:
        maximum = maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=request.group)
        shift = local.maximum - maximum
        scale = shift.exp()
        sums = torch.stack([total * scale, target, (moment + total * shift) * scale])
        dist.all_reduce(sums, group=request.group)
        total, target, moment = sums.unbind(0)
    log_total = total.log()
    # Not target - (maximum + log_total): the difference of near numbers is exact, their sum would be rounded first.
    logprobs = (target - maximum) - log_total
    return Merged(logprobs, log_total - moment / total, maximum, log_total)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, request: Request, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        rows = request.real_rows(weight)
        local_targets = targets - request.vocab_start
        local_targets = torch.where((local_targets >= 0) & (local_targets < rows.shape[0]), local_targets, -1)
        logprobs, entropy, maximum, log_total = merge(kernels.statistics(hidden, rows, local_targets, request), request)
        ctx.save_for_backward(hidden, weight, local_targets, maximum, log_total, entropy)
        ctx.request, ctx.kernels = request, kernels
        if not request.with_entropy:
            ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, maximum, log_total, entropy = ctx.saved_tensors
        if grad_logprob is None and grad_entropy is None:
            return None, None, None, None, None
        grad_logprob = torch.zeros_like(log_total) if grad_logprob is None else grad_logprob
        softmax = Softmax(maximum, log_total, entropy, grad_logprob, grad_entropy)
        grad_hidden, grad_rows = _over_active_tokens(ctx, hidden, weight, targets, softmax)
        missing = weight.shape[0] - grad_rows.shape[0]
        grad_weight = torch.nn.functional.pad(grad_rows, (0, 0, 0, missing)) if missing else grad_rows
        return grad_hidden, grad_weight, None, None, None


def _over_active_tokens(
    ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softmax: Softmax
) -> tuple[Tensor, Tensor]:
    """Gradients, computed only for tokens through which a gradient flows."""
    rows = ctx.request.real_rows(weight)
    active = softmax.grad_logprob != 0
    if softmax.grad_entropy is not None:
        active = active | (softmax.grad_entropy != 0)
    index = active.nonzero().squeeze(1)
    if index.numel() == hidden.shape[0]:
        return ctx.kernels.gradients(hidden, rows, targets, softmax, ctx.request)
    part, grad_rows = ctx.kernels.gradients(hidden[index], rows, targets[index], softmax.select(index), ctx.request)
    return torch.zeros_like(hidden).index_copy_(0, index, part), grad_rows
