"""PPO with a critic: advantages by GAE, a clipped value loss, and a KL penalty in the reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator

from megatron_rl.algorithms.advantages import at_last_token
from megatron_rl.algorithms.aggregation import LossAggregation, token_average
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.kl import AdaptiveKL, KLEstimator
from megatron_rl.algorithms.moments import masked_moments, whiten
from megatron_rl.algorithms.policy_gradient import PolicyGradient
from megatron_rl.algorithms.roles import ValueSource
from megatron_rl.algorithms.surrogate import value_loss
from megatron_rl.batch import Batch
from megatron_rl.config.ranges import Fraction, Positive
from megatron_rl.dataflow import Stage
from megatron_rl.ops.gae import gae
from megatron_rl.workers.loss import LossInputs, LossOutput


@ALGORITHMS.register("ppo")
class PPO(PolicyGradient):
    """Proximal Policy Optimization (arXiv 1707.06347) as used for language models (arXiv 1909.08593, 2203.02155).

    The reward of a response is given at its last token, minus ``kl_coefficient`` times the KL at every token. Steps are
    response tokens; observations of multi-turn responses are skipped, not discounted through. Truncated responses are
    treated as finished: the value after the last token is 0.
    """

    class Config(PolicyGradient.Config):
        """Settings of PPO."""

        gamma: Fraction = 1.0
        """Discount per response token."""
        lam: Fraction = 0.95
        """Lambda of GAE."""
        whiten_advantages: bool = True
        """Mean 0 and variance 1 over all response tokens of the data-parallel world."""
        value_clip: Positive | None = 0.2
        """Distance from the old value beyond which moving a value no longer lowers its loss; none: no clip."""
        critic_warmup_steps: int = Field(default=0, ge=0)
        """Updates at the beginning in which only the critic is trained."""
        kl_in: Literal["loss", "reward"] = "reward"
        """Token by token in the reward."""
        kl_estimator: KLEstimator = "k1"
        """Unbiased in rewards."""
        kl_target: Positive | None = None
        """Nats per response that the coefficient is steered to; none: the coefficient is constant."""
        kl_horizon: int = Field(default=10_000, gt=0)
        """Responses over which the coefficient can change by about a fifth."""
        shared_critic: bool = False
        """The critic is a value head on the actor's own weights (``actor.value_head: true``), trained in one loss."""
        value_coefficient: Positive = 0.1
        """Weight of the value loss beside the policy's, with a shared critic."""
        value_aggregation: LossAggregation = "token-mean"
        """How the critic's token losses become one number."""

        @model_validator(mode="after")
        def _adaptive_in_reward(self) -> Self:
            if self.kl_target is not None and self.kl_in != "reward":
                raise ValueError("kl_target steers the penalty in the reward: it needs kl_in='reward'")
            if self.value_aggregation == "fixed-length" and not self.norm_length:
                raise ValueError("value_aggregation='fixed-length' needs norm_length, the generation budget in tokens")
            return self

    name = "ppo"
    config: Config
    prepare_writes = ("advantages", "returns")

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        if not self.config.shared_critic:
            self.require("critic", "GAE (unless shared_critic is set)")
        target = self.config.kl_target
        self.controller = AdaptiveKL(super().kl_coefficient, target, self.config.kl_horizon) if target else None

    # --- advantages ------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> None:
        rewards = at_last_token(batch, batch["rewards"])
        if self.kl_in_reward:
            rewards = rewards - self.kl_coefficient * self.token_kl(batch)
        mask = batch["response_mask"].bool()
        advantages, returns = gae(rewards, batch["values"], mask, batch.cu_seqlens, self.config.gamma, self.config.lam)
        batch.metrics.update(self.value_metrics(batch, returns))
        batch.tokens["advantages"] = (
            whiten(advantages, mask, self.dp_group) if self.config.whiten_advantages else advantages
        )
        batch.tokens["returns"] = returns

    def value_metrics(self, batch: Batch, returns: torch.Tensor) -> dict[str, float]:
        """Mean value and return, and the share of the returns' variance that the critic explains."""
        mask = batch["response_mask"]
        target = masked_moments(returns, mask, self.dp_group)
        error = masked_moments(returns - batch["values"], mask, self.dp_group)
        explained = 1.0 - error.variance / target.variance if target.variance > 0 else 0.0
        values = masked_moments(batch["values"], mask, self.dp_group)
        return {"values/mean": values.mean, "returns/mean": target.mean, "values/explained_variance": explained}

    # --- a critic on shared weights --------------------------------------------------------------------------------

    def loss(self, inputs: LossInputs) -> LossOutput:
        if not self.config.shared_critic:
            return super().loss(inputs)
        value = self.critic_loss(inputs)
        if self.is_warming_up:
            return LossOutput(self.config.value_coefficient * value.loss, value.metrics)
        policy = super().loss(inputs)
        total = policy.loss + self.config.value_coefficient * value.loss
        return LossOutput(total, {**policy.metrics, **value.metrics})

    @property
    def is_warming_up(self) -> bool:
        """Whether only the values are trained at this step."""
        return self.step < self.config.critic_warmup_steps

    @property
    def token_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*super().token_reads, "values", "returns") if self.config.shared_critic else super().token_reads

    # --- the critic ------------------------------------------------------------------------------------------------

    def critic_loss(self, inputs: LossInputs) -> LossOutput:
        """Half the squared error of the values, clipped; pure."""
        assert inputs.values is not None, "the critic's worker passes values"
        average = token_average(inputs, self.config.value_aggregation, self.config.norm_length)
        values, old, returns = (
            inputs.masked(given) for given in (inputs.values, inputs.fields["values"], inputs.fields["returns"])
        )
        surrogate = value_loss(values, old, returns, self.config.value_clip)
        metrics = {
            "loss/value": average.metric(surrogate.loss),
            "values/clip_fraction": inputs.token_metric(surrogate.clipped.float()),
        }
        return LossOutput(average(surrogate.loss), metrics)

    def optimize_critic(self, batch: Batch) -> dict[str, float]:
        """All epochs and mini-batches of one step on the critic."""
        assert self.critic is not None
        metrics = self.critic.optimize(
            batch,
            self.critic_loss,
            num_epochs=self.config.num_epochs,
            num_mini_batches=self.config.num_mini_batches,
            reads=("values", "returns"),
            sequence_reads=(),
            with_entropy=False,
            group_field=self.group_field,
            seed=self.config.seed + self.step,
        )
        return {key.replace("optimizer/", "critic/"): value for key, value in metrics.items() if key != "loss/total"}

    # --- data flow -------------------------------------------------------------------------------------------------

    def forward_stages(self) -> list[Stage]:
        source = cast(ValueSource, self.actor) if self.config.shared_critic else self.critic
        assert source is not None
        return [*super().forward_stages(), source.values(write="values")]

    def optimize_stages(self) -> list[Stage]:
        if self.config.shared_critic:
            return super().optimize_stages()

        def train_critic(batch: Batch) -> None:
            batch.metrics.update(self.optimize_critic(batch))

        def train_actor(batch: Batch) -> None:
            if not self.is_warming_up:
                batch.metrics.update(self.optimize_actor(batch))
            self.finish_step(batch)

        sources = ("input_ids", "response_mask")
        return [
            self.loss_stage("critic.optimize", train_critic, (*sources, "values", "returns")),
            self.loss_stage("actor.optimize", train_actor, (*sources, *self.loss_fields)),
        ]

    @property
    def prepare_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*(name for name in super().prepare_reads if name != "groups"), "values")

    # --- the adaptive coefficient ----------------------------------------------------------------------------------

    @property
    def kl_coefficient(self) -> float:
        return self.controller.coefficient if self.controller else super().kl_coefficient

    def observe(self, metrics: Mapping[str, float]) -> None:
        if self.controller and "policy/reference_kl" in metrics:
            self.controller.update(metrics["policy/reference_kl"], metrics["policy/num_responses"])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"kl_coefficient": self.controller.coefficient} if self.controller else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.controller and "kl_coefficient" in state:
            self.controller.coefficient = float(state["kl_coefficient"])
