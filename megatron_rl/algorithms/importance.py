"""Log-ratios between policies, and the correction of the mismatch between trainer and rollout engine.

The engine that sampled (other kernels, quantised weights, an older version) is not quite the policy that trains.
Importance ratios are trainer over rollout; their product with the policy loss is bounded by truncation (truncated
importance sampling, E. Ionides 2008; for rollouts: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training") or by dropping what lies outside an interval (verl's ``rollout_rs``, "IcePop").
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from megatron_rl.algorithms.aggregation import on_mask
from megatron_rl.algorithms.bounds import NonNegative, Positive
from megatron_rl.algorithms.kl import MAX_LOG_RATIO
from megatron_rl.config import ConfigRecord
from megatron_rl.workers.loss import LossInputs


class MismatchCorrection(ConfigRecord):
    """How the policy loss is weighted by trainer over rollout probabilities."""

    level: Literal["off", "token", "sequence", "geometric"] = "off"
    """Ratio of each token, of the whole response (product), or the geometric mean over its tokens; off: weight 1."""
    mode: Literal["truncate", "mask"] = "truncate"
    """truncate: min(ratio, upper). mask: the ratio inside [lower, upper], 0 outside; denominators do not change."""
    upper: Positive = 2.0
    """Largest ratio kept as it is."""
    lower: NonNegative = 0.0
    """Smallest ratio that mask keeps; truncate has none."""
    warn_above: NonNegative = 0.05
    """Warn of a mismatch/kl above this, in nats a token, while the correction is off."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lower > self.upper:
            raise ValueError(f"lower={self.lower} is above upper={self.upper}: no ratio would be kept")
        if self.lower and self.mode == "truncate":
            raise ValueError(f"mode='truncate' does not use lower={self.lower}: it is for mode='mask'")
        return self


def masked_log_ratio(inputs: LossInputs, numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator - denominator`` on the response mask and 0 elsewhere, also in the gradient; ``[num_tokens]``."""
    return on_mask(inputs, numerator) - on_mask(inputs, denominator)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp with the exponent clamped to +-20; the gradient is 0 beyond."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def mismatch_weights(inputs: LossInputs, log_ratio: Tensor, correction: MismatchCorrection) -> Tensor:
    """Weight of each token's policy loss, ``[num_tokens]`` fp32, without gradient.

    Args:
        log_ratio: trainer minus rollout log-probabilities, 0 outside the response mask.
    """
    log_ratio = log_ratio.detach()
    if correction.level == "sequence":
        log_ratio = inputs.expand(inputs.sequence_sum(log_ratio))
    elif correction.level == "geometric":
        log_ratio = inputs.expand(inputs.sequence_mean(log_ratio))
    ratio = bounded_exp(log_ratio)
    if correction.mode == "truncate":
        return ratio.clamp(max=correction.upper)
    return torch.where((ratio >= correction.lower) & (ratio <= correction.upper), ratio, 0.0)
