"""RLOO, OPO, REINFORCE++ and REINFORCE++-baseline: policy gradients with a baseline and no critic."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from megatron_rl.algorithms.advantages import (
    at_last_token,
    group_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    spread_over_tokens,
    sum_over_tokens,
)
from megatron_rl.algorithms.aggregation import LossAggregation, TokenAverage
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.kl import KLEstimator
from megatron_rl.algorithms.moments import whiten
from megatron_rl.algorithms.unused_fields import refuse_unused
from megatron_rl.batch import Batch
from megatron_rl.config.ranges import Fraction
from megatron_rl.ops.gae import gae
from megatron_rl.workers.loss import LossInputs, Mean


@ALGORITHMS.register("rloo")
class RLOO(GRPO):
    """REINFORCE Leave-One-Out (arXiv 2402.14740): a response's baseline is the mean reward of the other responses to
    its prompt.

    The response is one action: the ratio is that of the whole response, exp of the sum of its token log-ratios, and is
    clipped as one (as in TRL's RLOOTrainer); the KL to the reference is part of the reward. On policy the ratio is 1
    and the gradient that of REINFORCE. A product over many tokens leaves the clip range quickly: with several optimizer
    steps a batch, long responses are mostly clipped after the first.
    """

    class Config(GRPO.Config):
        """Settings of RLOO."""

        loss_aggregation: LossAggregation = "seq-mean-token-sum"
        """Fixed: a mean over responses of a loss per response."""
        kl_in: Literal["loss", "reward"] = "reward"
        """As in the paper."""
        kl_estimator: KLEstimator = "k1"
        """Unbiased in rewards."""
        normalize_std: bool | Literal["batch"] = False
        """Fixed: only centred."""

        @model_validator(mode="after")
        def _whole_responses(self) -> Self:
            refuse_unused(
                self,
                "RLOO",
                loss_aggregation="a response is one action, and the loss a mean over responses",
                normalize_std="the mean of the others is its baseline; normalize_advantages scales over the batch",
            )
            if "token" in (self.correction.level, self.correction.reject):
                raise ValueError(
                    "RLOO has one ratio per response: correction.level and reject must be 'sequence' or 'geometric'"
                )
            return self

    name = "rloo"
    config: Config
    usual_kl_coefficient = 0.05
    of_sequences = True

    def advantages(self, rewards: Tensor, batch: Batch) -> Tensor:
        return leave_one_out_advantages(rewards, batch["groups"])

    def policy_loss(
        self, inputs: LossInputs, log_ratio: Tensor, weights: Tensor, average: TokenAverage
    ) -> tuple[Tensor, dict[str, Mean]]:
        return self.response_policy_loss(inputs, inputs.sequence_sum(log_ratio), weights)


@ALGORITHMS.register("opo")
class OPO(GRPO):
    """On-Policy RL with Optimal reward baseline (arXiv 2505.23585, section 3): a group's rewards are centred on their
    mean weighted by the responses' tokens.

    Meant for exactly one optimizer step a batch, which is the default: the ratio is 1 and nothing is clipped. There is
    neither KL nor entropy term. With ``mask_truncated``, truncated responses do not enter the baseline.
    """

    class Config(GRPO.Config):
        """Settings of OPO."""

        loss_aggregation: LossAggregation = "token-mean"
        """Every token has the same weight, as the baseline assumes."""
        normalize_std: bool | Literal["batch"] = False
        """Fixed: only centred."""

        @model_validator(mode="after")
        def _only_centred(self) -> Self:
            refuse_unused(self, "OPO", normalize_std="its baseline only centres; normalize_advantages scales")
            return self

    name = "opo"
    config: Config
    usual_kl_coefficient = 0.0

    def advantages(self, rewards: Tensor, batch: Batch) -> Tensor:
        lengths = sum_over_tokens(batch, torch.ones(batch.num_tokens))
        return length_weighted_advantages(rewards, batch["groups"], lengths)


@ALGORITHMS.register("reinforce++")
class ReinforcePP(GRPO):
    """REINFORCE++ (arXiv 2501.03262, section 3): rewards to go with a token-level KL penalty, whitened over all tokens
    of the data-parallel world; no groups are needed.

    Rewards to go step from response token to response token, past observations.
    """

    compares_samples = False

    class Config(GRPO.Config):
        """Settings of REINFORCE++."""

        loss_aggregation: LossAggregation = "token-mean"
        """Mean over all tokens of the mini-batch."""
        kl_in: Literal["loss", "reward"] = "reward"
        """Token by token in the reward."""
        kl_estimator: KLEstimator = "k1"
        """Unbiased in rewards."""
        gamma: Fraction = 1.0
        """Discount per response token."""
        normalize_std: bool | Literal["batch"] = False
        """Fixed: rewards are whitened over all tokens instead."""

        @model_validator(mode="after")
        def _no_group_deviation(self) -> Self:
            whitens = "it has no groups and whitens over all tokens"
            refuse_unused(self, "REINFORCE++", normalize_std=whitens, normalize_advantages=whitens)
            return self

    name = "reinforce++"
    config: Config
    usual_kl_coefficient = 0.01

    def prepare(self, batch: Batch) -> None:
        rewards = at_last_token(batch, batch["rewards"])
        if self.kl_in_reward:
            rewards = rewards - self.kl_coefficient * self.token_kl(batch)
        mask = batch["response_mask"].bool()
        to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, batch.cu_seqlens, self.config.gamma, 1.0)
        batch.tokens["advantages"] = whiten(to_go, mask, self.dp_group)


@ALGORITHMS.register("reinforce++-baseline")
class ReinforcePPBaseline(GRPO):
    """REINFORCE++-baseline (arXiv 2501.03262, section 3): rewards centred within their group, then whitened over all
    tokens of the data-parallel world; the KL is a k2 term of the loss."""

    class Config(GRPO.Config):
        """Settings of REINFORCE++-baseline."""

        loss_aggregation: LossAggregation = "token-mean"
        """Mean over all tokens of the mini-batch."""
        kl_estimator: KLEstimator = "k2"
        """Its gradient is that of the KL."""
        normalize_std: bool | Literal["batch"] = False
        """Fixed: centred rewards are whitened over all tokens instead."""

        @model_validator(mode="after")
        def _no_group_deviation(self) -> Self:
            whitens = "it whitens over all tokens instead"
            refuse_unused(self, "REINFORCE++-baseline", normalize_std=whitens, normalize_advantages=whitens)
            return self

    name = "reinforce++-baseline"
    config: Config
    usual_kl_coefficient = 0.01

    def prepare(self, batch: Batch) -> None:
        centred = group_advantages(self.shaped_rewards(batch), batch["groups"], normalize_std=False)
        mask = batch["response_mask"].bool()
        batch.tokens["advantages"] = whiten(spread_over_tokens(batch, centred), mask, self.dp_group)
