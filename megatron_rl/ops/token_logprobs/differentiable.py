"""What all implementations of `token_logprobs` share: the merge over vocabulary shards, and the autograd function.

An implementation supplies `Kernels`: statistics of each token over this rank's rows, and gradients given the merged
softmax. The merge is that of Milakov and Gimelshein 2018 (arXiv:1805.02867): two small all-reduces in the forward pass,
none in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

NOTHING = -1e30  # the maximum over no rows: finite, so that merging never meets inf - inf


@dataclass(frozen=True, slots=True)
class LogprobOptions:
    """The options of one call, as the interface checked them."""

    vocab_start: int
    vocab_size: int
    temperature: float
    group: dist.ProcessGroup | None
    with_entropy: bool
    chunk_tokens: int | None
    softcap: float | None = None

    def capped(self, logits: Tensor) -> Tensor:
        """``softcap * tanh(logits / softcap)``, in the dtype of ``logits``."""
        return logits if self.softcap is None else logits.div(self.softcap).tanh_().mul_(self.softcap)

    def through_cap(self, capped: Tensor) -> Tensor | None:
        """By what the gradient of ``capped`` logits is multiplied on its way to the uncapped ones; None = by 1."""
        return None if self.softcap is None else 1 - (capped / self.softcap).square()

    def num_real(self, rows: int) -> int:
        """How many of this rank's ``rows`` are not padding."""
        return max(0, min(self.vocab_size - self.vocab_start, rows))

    def real_rows(self, weight: Tensor) -> Tensor:
        """The rows of ``weight`` that are not padding."""
        return weight[: self.num_real(weight.shape[0])]

    def local_targets(self, targets: Tensor, rows: int) -> Tensor:
        """Row numbers among this rank's real ``rows``, -1 = held by another rank."""
        local = targets - self.vocab_start
        return torch.where((local >= 0) & (local < rows), local, -1)


class Statistics(NamedTuple):
    """Statistics of each token over this rank's rows, ``[tokens]`` fp32, logits already divided by the temperature."""

    maximum: Tensor  # NOTHING where there are no rows
    total: Tensor  # sum of exp(logit - maximum)
    target: Tensor  # logit of the target; 0 where another rank holds it
    moment: Tensor  # sum of exp(logit - maximum) * (logit - maximum); 0 without entropy


class Softmax(NamedTuple):
    """What the backward pass needs of each token over the whole vocabulary, ``[tokens]`` fp32."""

    maximum: Tensor  # largest logit
    log_total: Tensor  # log of the sum of exp(logit - maximum)
    entropy: Tensor  # without entropy: not read
    grad_logprob: Tensor
    grad_entropy: Tensor | None  # None: no gradient flows through entropies

    def select(self, index: Tensor | slice) -> Softmax:
        """The same of some tokens."""
        rest = None if self.grad_entropy is None else self.grad_entropy[index]
        maximum, log_total, entropy, grad_logprob = (field[index] for field in self[:4] if field is not None)
        return Softmax(maximum, log_total, entropy, grad_logprob, rest)


@dataclass(frozen=True, slots=True)
class LogprobInputs:
    """The inputs of one call on one rank."""

    hidden: Tensor  # [tokens, hidden]
    weight: Tensor  # [rows, hidden], without padding rows
    targets: Tensor  # [tokens] row numbers of ``weight``, -1 = held by another rank
    options: LogprobOptions


def nothing(tokens: int, device: torch.device) -> Statistics:
    """Statistics over no rows."""
    zeros = torch.zeros(4, tokens, dtype=torch.float32, device=device)
    zeros[0] = NOTHING
    return Statistics(*zeros)


class Kernels(Protocol):
    """Local work of one implementation; one object serves one call and may keep what the backward pass can reuse."""

    def logit_statistics(self, logits: Tensor, targets: Tensor, options: LogprobOptions) -> Statistics:
        """Statistics of contiguous logits [tokens, rows], not yet divided by the temperature; does not change them."""
        ...

    def logit_gradients(self, logits: Tensor, targets: Tensor, softmax: Softmax, options: LogprobOptions) -> Tensor:
        """Gradient of such logits, in their dtype; may overwrite them."""
        ...

    def statistics(self, inputs: LogprobInputs, keep: bool) -> Statistics:
        """``keep``: a backward pass will follow."""
        ...

    def gradients(
        self, inputs: LogprobInputs, softmax: Softmax, active: Tensor | None, want_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of ``hidden`` (this rank's part) and, if wanted, of ``weight``, in their dtypes.

        ``inputs`` and ``softmax`` hold only the tokens ``active`` of the forward pass; None = all of them.
        """
        ...


def apply(
    kernels: Kernels, hidden: Tensor, weight: Tensor | None, targets: Tensor, options: LogprobOptions
) -> tuple[Tensor, Tensor | None]:
    """Run ``kernels`` on one call of the interface; without ``weight``, ``hidden`` are logits."""
    if weight is None:
        logprobs, entropy = _LogitLogprobs.apply(hidden, targets, options, kernels)
        return logprobs, entropy if options.with_entropy else None
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, options, kernels, keep)
    return logprobs, entropy if options.with_entropy else None


class _Merged(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    maximum: Tensor
    log_total: Tensor


def merge(local: Statistics, group: dist.ProcessGroup | None) -> _Merged:
    """One all-reduce for the maxima and one for the sums; none without a group."""
    maximum, total, target, moment = local
    if group is not None:
        maximum = maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        shift = local.maximum - maximum
        scale = shift.exp()
        sums = torch.stack([total * scale, target, (moment + total * shift) * scale])
        dist.all_reduce(sums, group=group)
        total, target, moment = sums.unbind(0)
    log_total = total.log()
    # Not target - (maximum + log_total): the difference of near numbers is exact, their sum would be rounded first.
    return _Merged((target - maximum) - log_total, log_total - moment / total, maximum, log_total)


def _outputs(
    ctx: Any, options: LogprobOptions, kernels: Kernels, merged: _Merged, *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """End of both forward passes: save ``inputs`` and the merged softmax for the backward pass."""
    ctx.save_for_backward(*inputs, merged.maximum, merged.log_total, merged.entropy)
    ctx.options, ctx.kernels = options, kernels
    ctx.set_materialize_grads(False)
    if not options.with_entropy:
        ctx.mark_non_differentiable(merged.entropy)
    return merged.logprobs, merged.entropy


def _softmax(saved: Sequence[Tensor], grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> Softmax:
    """What both backward passes begin with; ``saved`` by `_outputs`."""
    maximum, log_total, entropy = saved
    grad_logprob = torch.zeros_like(log_total) if grad_logprob is None else grad_logprob
    return Softmax(maximum, log_total, entropy, grad_logprob, grad_entropy)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: LogprobOptions, kernels: Kernels, keep: bool
    ) -> tuple[Tensor, Tensor]:
        rows = options.real_rows(weight)
        local = options.local_targets(targets, rows.shape[0])
        inputs = LogprobInputs(hidden.detach(), rows.detach(), local, options)
        merged = merge(kernels.statistics(inputs, keep), options.group)
        return _outputs(ctx, options, kernels, merged, hidden, weight, local)

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 6
        hidden, weight, targets, *saved = ctx.saved_tensors
        inputs = LogprobInputs(hidden, ctx.options.real_rows(weight), targets, ctx.options)
        softmax = _softmax(saved, grad_logprob, grad_entropy)
        grad_hidden, grad_rows = _active_gradients(ctx.kernels, inputs, softmax, ctx.needs_input_grad[1])
        if grad_rows is not None and grad_rows.shape != weight.shape:
            padding = weight.shape[0] - grad_rows.shape[0]
            grad_rows = torch.nn.functional.pad(grad_rows, (0, 0, 0, padding))
        return grad_hidden, grad_rows, None, None, None, None


class _LogitLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, options: LogprobOptions, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        real = logits.detach()[:, : options.num_real(logits.shape[1])].contiguous()
        local = options.local_targets(targets, real.shape[1])
        found = kernels.logit_statistics(real, local, options) if real.numel() else nothing(len(real), real.device)
        return _outputs(ctx, options, kernels, merge(found, options.group), logits, local)

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 4
        logits, targets, *saved = ctx.saved_tensors
        softmax = _softmax(saved, grad_logprob, grad_entropy)
        real = logits[:, : ctx.options.num_real(logits.shape[1])].clone(memory_format=torch.contiguous_format)
        if real.numel():
            real = ctx.kernels.logit_gradients(real, targets, softmax, ctx.options)
        return torch.nn.functional.pad(real, (0, logits.shape[1] - real.shape[1])), None, None, None


def _active_gradients(
    kernels: Kernels, inputs: LogprobInputs, softmax: Softmax, want_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients, computed only for tokens through which a gradient flows."""
    flows = softmax.grad_logprob != 0
    if softmax.grad_entropy is not None:
        flows = flows | (softmax.grad_entropy != 0)
    active = flows.nonzero().squeeze(1)
    if active.numel() == flows.numel():
        return kernels.gradients(inputs, softmax, None, want_weight)
    part = LogprobInputs(inputs.hidden[active], inputs.weight, inputs.targets[active], inputs.options)
    grad_active, grad_rows = kernels.gradients(part, softmax.select(active), active, want_weight)
    return torch.zeros_like(inputs.hidden).index_copy_(0, active, grad_active), grad_rows
