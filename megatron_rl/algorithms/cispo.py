"""CISPO and SAPO: every token keeps its gradient; the influence of the ratio is bounded or decays instead."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator
from torch import Tensor

from megatron_rl.algorithms.aggregation import LossAggregation
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.surrogate import Surrogate, cispo_surrogate, soft_gate_surrogate
from megatron_rl.algorithms.unused_fields import refuse_unused
from megatron_rl.config.ranges import NonNegative, Positive
from megatron_rl.workers.loss import LossInputs


@ALGORITHMS.register("cispo")
class CISPO(GRPO):
    """Clipped Importance Sampling weights Policy Optimization (MiniMax-M1, arXiv 2506.13585, eqs. 4 and 5).

    Bounds are relative to 1: the weight is held in [1 - clip_low, 1 + clip_high].
    """

    class Config(GRPO.Config):
        """Settings of CISPO."""

        clip_low: NonNegative = 1.0
        """1 means no lower bound, as in the paper."""
        clip_high: NonNegative = 4.0
        """The weight is clipped at 1 + clip_high."""
        loss_aggregation: LossAggregation = "token-mean"
        """Mean over all tokens of the mini-batch."""

        @model_validator(mode="after")
        def _no_dual_clip(self) -> Self:
            refuse_unused(self, "CISPO", dual_clip="its weight is bounded on both sides already; leave it unset")
            return self

    name = "cispo"
    config: Config
    usual_kl_coefficient = 0.0

    def surrogate(self, inputs: LossInputs, log_ratio: Tensor) -> Surrogate:
        logprobs = inputs.masked(inputs.logprobs)
        advantages = inputs.masked(inputs.fields["advantages"])
        return cispo_surrogate(logprobs, log_ratio, advantages, self.config.clip_low, self.config.clip_high)


@ALGORITHMS.register("sapo")
class SAPO(GRPO):
    """Soft Adaptive Policy Optimization (arXiv 2511.20347): a sigmoid gate around ratio 1 instead of a clip."""

    class Config(GRPO.Config):
        """Settings of SAPO."""

        tau_positive: Positive = 1.0
        """Steepness of the gate where the advantage is positive."""
        tau_negative: Positive = 1.05
        """Steepness elsewhere; a little higher, as negative updates are less stable."""

        @model_validator(mode="after")
        def _no_clip(self) -> Self:
            gate = "its gate takes the place of clips; leave it unset"
            refuse_unused(self, "SAPO", dual_clip=gate, clip_low=gate, clip_high=gate)
            return self

    name = "sapo"
    config: Config
    usual_kl_coefficient = 0.0

    def surrogate(self, inputs: LossInputs, log_ratio: Tensor) -> Surrogate:
        advantages = inputs.masked(inputs.fields["advantages"])
        return soft_gate_surrogate(log_ratio, advantages, self.config.tau_positive, self.config.tau_negative)
