"""What a loss sees and what it returns: `LossInputs` -> `LossOutput`, pure functions of tensors.

A loss runs once per micro-batch on the last pipeline stage. It sees this rank's tokens (context parallelism may have
split every sequence) and the *global* totals of the mini-batch, so that micro-batching, data parallelism, context
parallelism and packing change nothing: losses are sums over tokens or sequences divided by totals that are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over the whole mini-batch, all data-parallel ranks together."""

    tokens: float  # positions whose ``response_mask`` is 1
    sequences: float  # sequences with at least one such position
    groups: float = 0.0  # prompts (or preference pairs) behind these sequences


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric as its sum and its weight, so that it can be added over micro-batches and ranks before dividing. Of a
    metric whose name ends in ``_max`` the largest total is kept."""

    total: Tensor  # scalar, detached
    weight: Tensor  # scalar, detached


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch of one rank. Token tensors are ``[num_tokens]`` and *predictor-aligned*: position p holds what
    belongs to token p + 1 of the same sequence; ``response_mask`` is 0 at each sequence's last position and on
    padding."""

    logprobs: Tensor  # [num_tokens] fp32, with gradient: log-probability of the next token at the training temperature
    fields: Mapping[str, Tensor]  # token fields: response_mask (bool), old_logprobs, ref_logprobs, advantages, ...
    sequences: Mapping[str, Tensor]  # sequence fields [num_sequences] of this micro-batch: rewards, labels, ...
    sequence_ids: Tensor  # [num_tokens] int64: which of the micro-batch's sequences each position belongs to
    num_sequences: int  # in this micro-batch
    totals: Totals
    entropy: Tensor | None = None  # [num_tokens] fp32, with gradient, where the algorithm reads it
    values: Tensor | None = None  # [num_tokens] fp32, with gradient, from a value head
    cp_group: dist.ProcessGroup | None = field(default=None, repr=False)  # None: sequences are whole on this rank

    @property
    def mask(self) -> Tensor:
        """``response_mask`` as fp32, ``[num_tokens]``."""
        return self.fields["response_mask"].float()

    def masked(self, per_token: Tensor) -> Tensor:
        """``per_token`` with 0 off the response mask, also in the gradient; NaN and infinity there do not spread."""
        return torch.where(self.fields["response_mask"].bool(), per_token, 0.0)

    @property
    def cp_size(self) -> int:
        return 1 if self.cp_group is None else self.cp_group.size()

    def sequence_sum(self, per_token: Tensor) -> Tensor:
        """Sum over each whole sequence, ``[num_tokens] -> [num_sequences]``, over all context-parallel ranks.

        Every context-parallel rank gets the same sums, and the gradient reaches each rank's own tokens exactly once:
        a loss of sequence sums must therefore be returned whole by every rank (gradients of parameters are summed).
        """
        sums = per_token.new_zeros(self.num_sequences).index_add(0, self.sequence_ids, per_token)
        return sums if self.cp_group is None else _SumOverContext.apply(sums, self.cp_group)

    def sequence_mean(self, per_token: Tensor) -> Tensor:
        """Mean over each sequence's masked tokens, ``[num_sequences]``; 0 for a sequence without any."""
        return self.sequence_sum(self.masked(per_token)) / self.sequence_sum(self.mask).clamp_min(1.0)

    def expand(self, per_sequence: Tensor) -> Tensor:
        """Give every token its sequence's value: ``[num_sequences] -> [num_tokens]``."""
        return per_sequence[self.sequence_ids]

    def token_metric(self, per_token: Tensor) -> Mean:
        """Mean over the masked tokens; other positions are ignored, NaN included."""
        return Mean(self.masked(per_token.detach()).sum(), self.mask.sum())

    def sequence_metric(self, per_sequence: Tensor, weight: Tensor | None = None) -> Mean:
        """Mean over sequences of weight above 0 (equal on all context-parallel ranks, hence counted once)."""
        weight = torch.ones_like(per_sequence) if weight is None else weight
        counted = torch.where(weight > 0, per_sequence.detach(), 0.0)
        return Mean((counted * weight).sum() / self.cp_size, weight.sum() / self.cp_size)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """``loss`` is a scalar with gradient, already divided by global totals: the loss of the mini-batch is its sum over
    micro-batches and data-parallel (and, for token sums, context-parallel) ranks."""

    loss: Tensor
    metrics: Mapping[str, Mean] = field(default_factory=dict)
    of_sequences: bool = False  # a function of whole sequences (`sequence_sum`): equal on all context-parallel ranks


LossFunction = Callable[[LossInputs], LossOutput]


class _SumOverContext(torch.autograd.Function):
    """All-reduce forward, identity backward: each rank holds the same sum and owns its tokens' gradient."""

    @staticmethod
    def forward(ctx, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = sums.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
