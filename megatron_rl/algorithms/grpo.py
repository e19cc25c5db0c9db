"""GRPO and Dr. GRPO: the baseline of a response is the mean reward of all responses to its prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import (
    batch_scaled_advantages,
    group_advantages,
    spread_over_tokens,
    sum_over_tokens,
)
from megatron_rl.algorithms.aggregation import LossAggregation
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.moments import whiten
from megatron_rl.algorithms.policy_gradient import PolicyGradient
from megatron_rl.batch import Batch


@ALGORITHMS.register("grpo")
class GRPO(PolicyGradient):
    """Group Relative Policy Optimization (arXiv 2402.03300, eqs. 3 and 4).

    The advantage of a response is its reward, centred and (``normalize_std``) scaled within the responses to the same
    prompt; each of its tokens has that advantage.
    """

    compares_samples = True

    class Config(PolicyGradient.Config):
        """Settings of GRPO."""

        loss_aggregation: LossAggregation = "seq-mean-token-mean"
        """The paper's: mean over a response's tokens, then over responses."""
        normalize_std: bool | Literal["batch"] = True
        """Divide a group's centred rewards by their standard deviation; batch: by that of all rewards of the step."""
        normalize_advantages: bool = False
        """Then shift and scale advantages to mean 0 and variance 1 over all responses of the step."""

    name = "grpo"
    config: Config
    usual_kl_coefficient = 0.04  # the paper's

    def prepare(self, batch: Batch) -> None:
        values = self.advantages(self.shaped_rewards(batch), batch)
        if self.config.normalize_advantages:
            values = whiten(values, torch.ones_like(values, dtype=torch.bool), self.dp_group)
        batch.tokens["advantages"] = spread_over_tokens(batch, values)

    def advantages(self, rewards: Tensor, batch: Batch) -> Tensor:
        """``[num_sequences]`` -> ``[num_sequences]``; the hook of other group baselines."""
        if self.config.normalize_std == "batch":
            return batch_scaled_advantages(rewards, batch["groups"], self.dp_group)
        return group_advantages(rewards, batch["groups"], normalize_std=self.config.normalize_std)

    def shaped_rewards(self, batch: Batch) -> Tensor:
        """Rewards before grouping, ``[num_sequences]``: minus the responses' KL when it is part of the reward."""
        rewards = batch["rewards"]
        if self.kl_in_reward:
            rewards = rewards - self.kl_coefficient * sum_over_tokens(batch, self.token_kl(batch))
        return rewards


@ALGORITHMS.register("dr-grpo")
class DrGRPO(GRPO):
    """Dr. GRPO (arXiv 2503.20783, section 3.2): no division by the group's deviation, and a constant divisor instead of
    each response's length, so neither easy prompts nor short answers are favoured."""

    class Config(GRPO.Config):
        """Settings of Dr. GRPO; ``norm_length`` is required."""

        loss_aggregation: LossAggregation = "fixed-length"
        """The sum over a response's tokens divided by norm_length."""
        normalize_std: bool | Literal["batch"] = False
        """Off: only centred."""

    name = "dr-grpo"
    config: Config
