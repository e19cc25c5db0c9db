"""GSPO and GMPO: the ratio of a whole response, length-normalised, instead of one per token."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator
from torch import Tensor

from megatron_rl.algorithms.aggregation import (
    LossAggregation,
    TokenAverage,
    answered_metric,
    sequence_average,
)
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.importance import bounded_exp
from megatron_rl.algorithms.rollout_correction import RolloutCorrection
from megatron_rl.algorithms.surrogate import pessimistic_log_ratio, sequence_token_log_ratio
from megatron_rl.algorithms.unused_fields import refuse_unused
from megatron_rl.config.ranges import NonNegative
from megatron_rl.workers.loss import LossInputs, Mean


@ALGORITHMS.register("gspo")
class GSPO(GRPO):
    """Group Sequence Policy Optimization (arXiv 2507.18071, eqs. 5 and 7).

    The sequence ratio is exp(mean of the token log-ratios); the gradient is taken through it. ``token_form`` is the
    paper's GSPO-token (eqs. 13 and 14), where every token has that value and its own gradient; with one advantage per
    response and the default aggregation both have the same value and gradient.
    """

    class Config(GRPO.Config):
        """Settings of GSPO."""

        clip_low: NonNegative = 3e-4
        """Lower clip of the sequence ratio, the paper's."""
        clip_high: NonNegative = 4e-4
        """Upper clip of the sequence ratio, the paper's."""
        token_form: bool = False
        """GSPO-token: needed when tokens of one response have different advantages."""

        @model_validator(mode="after")
        def _sequence_level(self) -> Self:
            if not self.token_form:
                check_sequence_level(self.loss_aggregation, self.correction, "GSPO")
            return self

    name = "gspo"
    config: Config
    usual_kl_coefficient = 0.0

    @property
    def of_sequences(self) -> bool:  # type: ignore[override]
        return not self.config.token_form

    def policy_loss(
        self, inputs: LossInputs, log_ratio: Tensor, weights: Tensor, average: TokenAverage
    ) -> tuple[Tensor, dict[str, Mean]]:
        sequence_log_ratio = inputs.sequence_mean(log_ratio)
        if self.config.token_form:
            logprobs = inputs.masked(inputs.logprobs)
            per_token = sequence_token_log_ratio(inputs.expand(sequence_log_ratio), logprobs)
            return super().policy_loss(inputs, per_token, weights, average)
        return self.response_policy_loss(inputs, sequence_log_ratio, weights)


@ALGORITHMS.register("gmpo")
class GMPO(GRPO):
    """Geometric-Mean Policy Optimization (arXiv 2507.20673, section 3): token ratios are clipped first, then averaged
    geometrically over the response. Clips are in log space: a ratio is held in [exp(-low), exp(high)]."""

    class Config(GRPO.Config):
        """Settings of GMPO."""

        clip_low: NonNegative = 0.4
        """Tokens' log-ratios are held above -clip_low where that lowers the objective."""
        clip_high: NonNegative = 0.4
        """Tokens' log-ratios are held below clip_high where that lowers the objective."""
        loss_aggregation: LossAggregation = "seq-mean-token-mean"
        """Fixed: the objective is a mean over responses."""

        @model_validator(mode="after")
        def _sequence_level(self) -> Self:
            check_sequence_level(self.loss_aggregation, self.correction, "GMPO")
            refuse_unused(self, "GMPO", dual_clip="its token ratios are clipped on one side already; leave it unset")
            return self

    name = "gmpo"
    config: Config
    of_sequences = True

    def policy_loss(
        self, inputs: LossInputs, log_ratio: Tensor, weights: Tensor, average: TokenAverage
    ) -> tuple[Tensor, dict[str, Mean]]:
        token_advantages = inputs.masked(inputs.fields["advantages"])
        held = pessimistic_log_ratio(log_ratio, token_advantages, self.config.clip_low, self.config.clip_high)
        ratio = bounded_exp(inputs.sequence_mean(held))
        per_sequence = -inputs.sequence_mean(token_advantages) * ratio * inputs.sequence_mean(weights)
        metrics = {
            "loss/policy": answered_metric(inputs, per_sequence),
            "policy/clip_fraction": inputs.token_metric((held != log_ratio).to(ratio.dtype)),
        }
        return sequence_average(inputs, per_sequence), metrics


def check_sequence_level(aggregation: LossAggregation, correction: RolloutCorrection, name: str) -> None:
    """Raises ValueError for settings that have no meaning with one ratio per response."""
    if aggregation != "seq-mean-token-mean":
        raise ValueError(f"{name} averages over responses: loss_aggregation={aggregation!r} does not apply")
    if "token" in (correction.level, correction.reject):
        raise ValueError(
            f"{name} has one ratio per response: correction.level and reject must be 'sequence' or 'geometric'"
        )
