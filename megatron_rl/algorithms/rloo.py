"""RLOO, REINFORCE++ and its baseline form: plain policy gradients with a good baseline and no critic."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import group_advantages, leave_one_out_advantages, spread_over_tokens
from megatron_rl.algorithms.aggregation import LossAggregation
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.kl import KLEstimator
from megatron_rl.algorithms.moments import whiten
from megatron_rl.algorithms.token_rewards import at_last_token
from megatron_rl.batch import Batch
from megatron_rl.ops.gae import gae


@ALGORITHMS.register("rloo")
class RLOO(GRPO):
    """REINFORCE Leave-One-Out (arXiv 2402.14740): a response's baseline is the mean reward of its siblings.

    The response is one action, so token losses are summed; the KL to the reference is part of the reward. The ratio
    and its clip matter only with several optimizer steps per batch.
    """

    class Config(GRPO.Config):
        """Settings of RLOO."""

        loss_aggregation: LossAggregation = "seq-mean-token-sum"
        """The log-probability of a whole response."""
        kl_in: Literal["loss", "reward"] = "reward"
        """As in the paper."""
        kl_estimator: KLEstimator = "k1"
        """Unbiased in rewards."""

    name = "rloo"
    config: Config
    usual_kl_coefficient = 0.05

    def advantages(self, rewards: Tensor, batch: Batch) -> Tensor:
        return leave_one_out_advantages(rewards, batch["groups"])


@ALGORITHMS.register("reinforce++")
class ReinforcePP(GRPO):
    """REINFORCE++ (arXiv 2501.03262, section 3): rewards to go with a token-level KL penalty, whitened over all tokens
    of the data-parallel world; no groups are needed.

    Rewards to go step from response token to response token, past observations.
    """

    class Config(GRPO.Config):
        """Settings of REINFORCE++; ``normalize_std`` is not used."""

        loss_aggregation: LossAggregation = "token-mean"
        """Mean over all tokens of the mini-batch."""
        kl_in: Literal["loss", "reward"] = "reward"
        """Token by token in the reward."""
        kl_estimator: KLEstimator = "k1"
        """Unbiased in rewards."""
        gamma: float = 1.0
        """Discount per response token."""

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
        """Settings of the baseline form."""

        loss_aggregation: LossAggregation = "token-mean"
        """Mean over all tokens of the mini-batch."""
        kl_estimator: KLEstimator = "k2"
        """Its gradient is that of the KL."""

    name = "reinforce++-baseline"
    config: Config
    usual_kl_coefficient = 0.01

    def prepare(self, batch: Batch) -> None:
        centred = group_advantages(self.shaped_rewards(batch), batch["groups"], normalize_std=False)
        mask = batch["response_mask"].bool()
        batch.tokens["advantages"] = whiten(spread_over_tokens(batch, centred), mask, self.dp_group)
