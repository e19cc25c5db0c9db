"""Loss aggregation: the weights with which per-token losses become the loss of a mini-batch.

All modes are sums over tokens with constant weights, divided by the mini-batch's *global* totals, so that the loss and
its gradient add up exactly over micro-batches, data-parallel ranks and context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_rl.workers.loss import LossInputs, Mean

LossAggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "fixed-length"]


@dataclass(frozen=True, slots=True)
class TokenAverage:
    """Weights of one micro-batch's tokens, ``[num_tokens]`` in the dtype of the log-probabilities, 0 off the mask."""

    scale: Tensor  # weight in the loss
    share: Tensor  # weight in metrics: sums to 1 over the whole mini-batch

    def __call__(self, per_token: Tensor) -> Tensor:
        """This micro-batch's contribution, a scalar; values outside the mask are ignored, NaN included."""
        return self.weighted(per_token).sum()

    def weighted(self, per_token: Tensor) -> Tensor:
        """Each token's contribution, ``[num_tokens]``."""
        return torch.where(self.scale > 0, per_token, 0.0) * self.scale

    def metric(self, per_token: Tensor) -> Mean:
        """The same number as a metric: summed over micro-batches and ranks it is the mini-batch's value."""
        return Mean(self(per_token.detach()), self.share.sum())


def token_average(inputs: LossInputs, mode: LossAggregation, norm_length: int | None = None) -> TokenAverage:
    """The weights of each mode; T = all response tokens of the mini-batch, S = its sequences that have any.

    - ``token-mean``: 1/T. DAPO (arXiv 2503.14476, eq. 8).
    - ``token-sum``: 1. A plain sum; the divisor is then part of the learning rate. As verl's mode of this name.
    - ``seq-mean-token-sum``: 1/S. Plain policy gradient of whole responses.
    - ``seq-mean-token-mean``: 1/(S * |o_i|). GRPO (arXiv 2402.03300, eq. 3).
    - ``fixed-length``: 1/(S * norm_length). Dr. GRPO (arXiv 2503.20783, section 3).

    Args:
        norm_length: tokens; the generation budget, for ``fixed-length`` only.
    """
    mask = inputs.mask.to(inputs.logprobs.dtype)
    if mode == "token-mean":
        scale = mask / max(inputs.totals.tokens, 1.0)
        return TokenAverage(scale, scale)
    if mode == "token-sum":
        return TokenAverage(mask, mask / max(inputs.totals.tokens, 1.0))
    per_sequence = mask / max(inputs.totals.sequences, 1.0)
    share = per_sequence / inputs.expand(inputs.sequence_sum(mask).clamp_min(1.0))
    if mode == "seq-mean-token-mean":
        return TokenAverage(share, share)
    if mode == "seq-mean-token-sum":
        return TokenAverage(per_sequence, share)
    assert norm_length is not None, "checked by the algorithm's Config"
    return TokenAverage(per_sequence / norm_length, share)


def sequence_average(inputs: LossInputs, per_sequence: Tensor) -> Tensor:
    """Sum over this micro-batch's non-empty sequences divided by all of the mini-batch: ``[num_sequences] -> scalar``.

    Made of sequence sums, so every context-parallel rank returns it whole (see `LossInputs.sequence_sum`).
    """
    return torch.where(answered(inputs), per_sequence, 0.0).sum() / max(inputs.totals.sequences, 1.0)


def answered(inputs: LossInputs) -> Tensor:
    """Which sequences have at least one trained token, ``[num_sequences]`` bool."""
    return inputs.sequence_sum(inputs.mask) > 0


def answered_metric(inputs: LossInputs, per_sequence: Tensor) -> Mean:
    """Mean over the non-empty sequences."""
    return inputs.sequence_metric(per_sequence, answered(inputs).to(inputs.logprobs.dtype))
