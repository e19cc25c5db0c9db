"""Correction for the mismatch between trainer and rollout engine: weights, rejection and veto of one micro-batch.

The rollout policy (other kernels, quantised weights, an older version) is not exactly the policy in training.
The policy loss is weighted by importance ratios, trainer over rollout, which are bounded by truncation (truncated
importance sampling, E. Ionides 2008; for rollouts: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training") or by masking ratios outside an interval (verl's ``rollout_rs``, "IcePop").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from megatron_rl.algorithms.importance import bounded_exp
from megatron_rl.algorithms.unused_fields import refuse_unused
from megatron_rl.config import ConfigRecord
from megatron_rl.config.ranges import NonNegative, Positive
from megatron_rl.workers.loss import LossInputs, Mean

Level = Literal["off", "token", "sequence", "geometric"]


class RolloutCorrection(ConfigRecord):
    """How the policy loss is weighted by trainer over rollout probabilities, and which tokens are left out."""

    level: Level = "off"
    """Ratio of each token, of the whole response (product), or the geometric mean over its tokens; off: weight 1."""
    mode: Literal["truncate", "mask"] = "truncate"
    """truncate: the ratio held in [lower, upper]. mask: the ratio inside [lower, upper], 0 outside."""
    upper: Positive = 2.0
    """Largest ratio kept as it is."""
    lower: NonNegative = 0.0
    """Smallest ratio kept as it is."""
    normalize: bool = False
    """Divide weights by their mean over what the loss of the step is averaged over, so that they are 1 on average."""
    reject: Level = "off"
    """Level of a second ratio; tokens (or whole responses) with one outside [reject_lower, reject_upper] are left out,
    whatever the weights are."""
    reject_lower: NonNegative = 0.5
    """Smallest ratio that is not rejected."""
    reject_upper: Positive = 2.0
    """Largest ratio that is not rejected."""
    veto: NonNegative = 0.0
    """A response with any token whose ratio is below this is left out; 0: none. 1e-4 is usual."""
    denominators: Literal["all", "kept"] = "all"
    """Whether the loss is averaged over all tokens or only over those that mask, reject and veto keep. kept takes the
    others out of the step: they have no KL, no entropy term and teach no critic."""
    warn_above: NonNegative = 0.05
    """Warn of a mismatch/kl above this, in nats a token, while the correction is off."""

    @property
    def is_on(self) -> bool:
        return self.level != "off" or self.drops

    @property
    def drops(self) -> bool:
        """Whether anything may be left out."""
        return self.reject != "off" or self.veto > 0 or (self.level != "off" and self.mode == "mask")

    @property
    def of_step(self) -> bool:
        """Whether the weights need all samples of the step before the first loss."""
        return self.normalize or self.denominators == "kept"

    @model_validator(mode="after")
    def _check(self) -> Self:
        for prefix in ("", "reject_"):
            lower, upper = getattr(self, prefix + "lower"), getattr(self, prefix + "upper")
            if lower > upper:
                raise ValueError(f"{prefix}lower={lower} is above {prefix}upper={upper}: no ratio would be kept")
        if self.level == "off":
            refuse_unused(self, "level='off'", normalize="there are no weights", lower="there are no weights")
        if self.reject == "off":
            reason = "it is for reject='token', 'sequence' or 'geometric'"
            refuse_unused(self, "reject='off'", reject_lower=reason, reject_upper=reason)
        if not self.drops:
            refuse_unused(self, "the correction", denominators="without mask, reject or veto all tokens are kept")
        return self


@dataclass(frozen=True, slots=True)
class Corrected:
    """The correction of one micro-batch, each ``[num_tokens]``, without gradient."""

    weights: Tensor  # of the policy loss; 0 where a token is left out
    kept: Tensor  # bool
    ratio: Tensor | None  # at the level of the weights, None where this is off
    vetoed: Tensor  # bool, all tokens of a response that the veto leaves out


def ratio_at(inputs: LossInputs, log_ratio: Tensor, level: Level) -> Tensor:
    """Trainer over rollout for each token, at a level; ``[num_tokens]``."""
    if level == "sequence":
        log_ratio = inputs.expand(inputs.sequence_sum(log_ratio))
    elif level == "geometric":
        log_ratio = inputs.expand(inputs.sequence_mean(log_ratio))
    return bounded_exp(log_ratio)


def correct(inputs: LossInputs, log_ratio: Tensor, correction: RolloutCorrection) -> Corrected:
    """Weights, rejection (verl's ``rollout_rs`` in its k1 modes, whose bounds are on the inverse ratio) and veto.

    Args:
        log_ratio: trainer minus rollout log-probabilities, 0 outside the response mask.
    """
    log_ratio = log_ratio.detach()
    weights = torch.ones_like(log_ratio)
    kept = vetoed = torch.zeros_like(log_ratio, dtype=torch.bool)
    kept = ~kept
    ratio = None
    if correction.level != "off":
        ratio = ratio_at(inputs, log_ratio, correction.level)
        weights = ratio.clamp(correction.lower, correction.upper)
        if correction.mode == "mask":
            kept = kept & (weights == ratio)
    if correction.reject != "off":
        second = ratio_at(inputs, log_ratio, correction.reject)
        kept = kept & (second >= correction.reject_lower) & (second <= correction.reject_upper)
    if correction.veto:
        low = inputs.masked((log_ratio < math.log(correction.veto)).to(log_ratio.dtype))
        vetoed = inputs.expand(inputs.sequence_sum(low)) > 0
        kept = kept & ~vetoed
    return Corrected(torch.where(kept, weights, 0.0), kept, ratio, vetoed)


def correction_metrics(inputs: LossInputs, found: Corrected, correction: RolloutCorrection) -> dict[str, Mean]:
    """Fractions of tokens, and mean weights; ``effective_sample_share`` is computed from ``weight_square``."""
    metrics = {
        "mismatch/weight_mean": inputs.token_metric(found.weights),
        "mismatch/weight_square": inputs.token_metric(found.weights.square()),
        "mismatch/dropped_fraction": inputs.token_metric((~found.kept).float()),
        "mismatch/vetoed_fraction": inputs.token_metric(found.vetoed.float()),
    }
    if found.ratio is not None:
        metrics["mismatch/clipped_high_fraction"] = inputs.token_metric((found.ratio > correction.upper).float())
        metrics["mismatch/clipped_low_fraction"] = inputs.token_metric((found.ratio < correction.lower).float())
    return metrics
