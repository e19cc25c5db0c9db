"""`PolicyGradient`: the loss shared by GRPO, its variants and PPO; each overrides a small hook.

loss = policy term (weighted by the trainer/rollout correction) + kl_coefficient * KL - entropy_coefficient * entropy,
each averaged over tokens in the same way.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.advantages import sum_over_tokens
from megatron_rl.algorithms.aggregation import (
    LossAggregation,
    TokenAverage,
    answered_metric,
    sequence_average,
    token_average,
)
from megatron_rl.algorithms.base import BaseAlgorithm
from megatron_rl.algorithms.importance import bounded_exp, masked_log_ratio
from megatron_rl.algorithms.kl import KLEstimator, k3, kl_penalty
from megatron_rl.algorithms.moments import masked_moments
from megatron_rl.algorithms.rollout_correction import RolloutCorrection, correct, correction_metrics, ratio_at
from megatron_rl.algorithms.rollout_mismatch import (
    explain,
    mismatch_metrics,
    perplexity_ratio,
    response_starts,
    staleness,
)
from megatron_rl.algorithms.step_correction import correct_step
from megatron_rl.algorithms.surrogate import Surrogate, clipped_surrogate
from megatron_rl.batch import Batch
from megatron_rl.config.ranges import Finite, NonNegative
from megatron_rl.dataflow import Stage
from megatron_rl.workers.loss import LossInputs, LossOutput, Mean

logger = logging.getLogger(__name__)


class PolicyGradient(BaseAlgorithm):
    """Clipped policy optimisation over token fields ``advantages`` and, with a KL term, ``ref_logprobs``."""

    compares_samples: ClassVar[bool] = False  # advantages come from the other samples of a prompt: one alone has none

    class Config(BaseAlgorithm.Config):
        """Settings shared by the policy-gradient family."""

        clip_low: NonNegative = 0.2
        """The ratio is clipped at 1 - clip_low where that lowers the objective."""
        clip_high: NonNegative = 0.2
        """The ratio is clipped at 1 + clip_high where that lowers the objective."""
        dual_clip: Finite | None = None
        """Bound c > 1 on the loss of tokens with negative advantage, in units of -advantage; none: unbounded."""
        loss_aggregation: LossAggregation = "token-mean"
        """How token losses become one number: see `aggregation.token_average`."""
        norm_length: int | None = Field(default=None, gt=0)
        """Constant divisor in tokens of the fixed-length aggregation: the generation budget."""
        kl_coefficient: NonNegative | None = None
        """Weight of the KL to the reference. None: the algorithm's usual weight where there is a reference, else 0."""
        kl_estimator: KLEstimator = "k3"
        """Estimator of that KL per token."""
        kl_in: Literal["loss", "reward"] = "loss"
        """Whether the KL is a term of the loss or is subtracted from the reward before advantages."""
        entropy_coefficient: Finite = 0.0
        """Weight of the entropy bonus."""
        log_entropy: bool = True
        """Log the policy's entropy also when it is not part of the loss."""
        correction: RolloutCorrection = RolloutCorrection()
        """Correction for the mismatch between trainer and rollout engine."""

        @model_validator(mode="after")
        def _check(self) -> Self:
            if self.loss_aggregation == "fixed-length" and not self.norm_length:
                raise ValueError("loss_aggregation='fixed-length' needs norm_length, the generation budget in tokens")
            if self.dual_clip is not None and self.dual_clip <= 1.0:
                raise ValueError(f"dual_clip={self.dual_clip} must be above 1 (3 is usual)")
            if self.correction.of_step and self.old_logprobs not in ("auto", "recompute"):
                raise ValueError(
                    f"old_logprobs={self.old_logprobs!r}, but correction.normalize and denominators='kept' compare the "
                    "trainer before the step with the engine: leave it at auto"
                )
            return self

    config: Config
    usual_kl_coefficient: ClassVar[float] = 0.05  # where a reference is given and no coefficient
    _warned_kl: float = 0.0
    of_sequences: bool = False  # whether `policy_loss` is made of sequence sums (see `LossInputs.sequence_sum`)

    # --- hooks -----------------------------------------------------------------------------------------------------

    def surrogate(self, inputs: LossInputs, log_ratio: Tensor) -> Surrogate:
        """The policy loss per token."""
        config = self.config
        return clipped_surrogate(
            log_ratio, inputs.fields["advantages"], config.clip_low, config.clip_high, config.dual_clip
        )

    def policy_loss(
        self, inputs: LossInputs, log_ratio: Tensor, weights: Tensor, average: TokenAverage
    ) -> tuple[Tensor, dict[str, Mean]]:
        """The policy term of this micro-batch and its metrics; ``weights`` is the rollout correction per token."""
        surrogate = self.surrogate(inputs, log_ratio)
        per_token = surrogate.loss * weights
        metrics = {
            "loss/policy": average.metric(per_token),
            "policy/clip_fraction": inputs.token_metric(surrogate.clipped.float()),
        }
        return average(per_token), metrics

    def response_policy_loss(
        self, inputs: LossInputs, log_ratio: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Mean]]:
        """The policy term of algorithms with one ratio and one clip per response, for `policy_loss`; they set
        ``of_sequences``.

        Args:
            log_ratio: of each response, ``[num_sequences]``, made of `LossInputs.sequence_sum`.
            weights: the rollout correction per token.
        """
        config = self.config
        advantages = inputs.sequence_mean(inputs.masked(inputs.fields["advantages"]))
        surrogate = clipped_surrogate(log_ratio, advantages, config.clip_low, config.clip_high, config.dual_clip)
        per_sequence = surrogate.loss * inputs.sequence_mean(weights)
        metrics = {
            "loss/policy": answered_metric(inputs, per_sequence),
            "policy/clip_fraction": answered_metric(inputs, surrogate.clipped.to(per_sequence.dtype)),
        }
        return sequence_average(inputs, per_sequence), metrics

    # --- the loss --------------------------------------------------------------------------------------------------

    def loss(self, inputs: LossInputs) -> LossOutput:
        config = self.config
        average = token_average(inputs, config.loss_aggregation, config.norm_length)
        old = self.old_logprobs_of(inputs)
        log_ratio = masked_log_ratio(inputs, inputs.logprobs, old)
        weights, metrics = self.correction_weights(inputs, old)
        loss, terms = self.policy_loss(inputs, log_ratio, weights, average)
        per_token, more = self.regularizers(inputs, average)
        extra = inputs.sequence_sum(average.weighted(per_token)).sum() if self.of_sequences else average(per_token)
        return LossOutput(loss + extra, metrics | terms | more | ratio_metrics(inputs, log_ratio), self.of_sequences)

    def regularizers(self, inputs: LossInputs, average: TokenAverage) -> tuple[Tensor, dict[str, Mean]]:
        """KL to the reference and entropy bonus, per token, already weighted by their coefficients."""
        config = self.config
        total = torch.zeros_like(inputs.logprobs)
        metrics = {}
        if "ref_logprobs" in inputs.fields and not self.kl_in_reward:
            difference = masked_log_ratio(inputs, inputs.logprobs, inputs.fields["ref_logprobs"])
            penalty = kl_penalty(difference, torch.zeros_like(difference), config.kl_estimator)
            metrics["loss/kl"] = average.metric(penalty)
            total = total + self.kl_coefficient * penalty
        if inputs.entropy is not None:
            metrics["policy/entropy"] = inputs.token_metric(inputs.entropy)
            if config.entropy_coefficient:
                total = total - config.entropy_coefficient * inputs.entropy
        return total, metrics

    def correction_weights(self, inputs: LossInputs, old: Tensor) -> tuple[Tensor, dict[str, Mean]]:
        """Weights, 1 without correction, and metrics of the mismatch, which is measured either way, except where the
        engine's log-probabilities are used as the old ones: the trainer's are then unknown."""
        correction, measured = self.config.correction, "staleness" in inputs.fields
        if not correction.is_on and not measured:
            return inputs.mask, {}
        log_ratio = masked_log_ratio(inputs, old, inputs.fields["rollout_logprobs"])
        metrics = mismatch_metrics(inputs, log_ratio) if measured else {}
        if not correction.is_on:
            return inputs.mask, metrics
        found = correct(inputs, log_ratio, correction)
        if correction.of_step:
            found = replace(found, weights=inputs.fields["correction_weights"])
        ratios = {level: ratio_at(inputs, log_ratio.detach(), level) for level in ("token", "sequence", "geometric")}
        metrics |= {f"mismatch/ratio_{level}": inputs.token_metric(ratio) for level, ratio in ratios.items()}
        more = correction_metrics(inputs, found, correction)
        if correction.of_step:  # `correct_step` has written these, from the tokens before any was left out
            del more["mismatch/dropped_fraction"], more["mismatch/vetoed_fraction"]
        return found.weights, metrics | more

    # --- data flow -------------------------------------------------------------------------------------------------

    def pack_stage(self) -> Stage:
        stage = super().pack_stage()

        def pack(batch: Batch) -> None:
            stage.run(batch)
            batch.tokens["staleness"] = staleness(batch, self.actor.policy_version)
            batch.tokens["response_starts"] = response_starts(batch)

        return replace(stage, run=pack, writes=(*stage.writes, "staleness", "response_starts"))

    def prepare_stage(self) -> Stage:
        stage, correction = super().prepare_stage(), self.config.correction
        if not correction.of_step:
            return stage
        old = self.old_logprobs_field
        assert old is not None, "checked by the Config"

        def run(batch: Batch) -> None:
            stage.run(batch)
            correct_step(batch, old, correction, self.dp_group)

        reads = tuple(dict.fromkeys((*stage.reads, old, "rollout_logprobs")))
        return replace(stage, run=run, reads=reads, writes=(*stage.writes, "correction_weights", "response_mask"))

    def finish_step(self, batch: Batch) -> None:
        super().finish_step(batch)
        square = batch.metrics.pop("mismatch/weight_square", 0.0)
        if square > 0:  # Kish's effective sample size as a share of the tokens
            batch.metrics["mismatch/effective_sample_share"] = batch.metrics["mismatch/weight_mean"] ** 2 / square
        if "mismatch/kl" not in batch.metrics:
            return
        batch.metrics["mismatch/perplexity_ratio"] = perplexity_ratio(batch.metrics)
        kl, correction = batch.metrics["mismatch/kl"], self.config.correction
        if not correction.is_on and kl > max(correction.warn_above, self._warned_kl):
            self._warned_kl = 2 * kl  # again when it has doubled
            logger.warning(
                "trainer and rollout engine differ by %.4f nats per token: %s. algorithm.correction.level: "
                "token weighs samples against it",
                kl,
                explain(batch.metrics, self.actor.verify_weights()),
            )

    def forward_stages(self) -> list[Stage]:
        stages = super().forward_stages()
        if self.with_kl:
            self.require("reference", f"kl_coefficient={self.kl_coefficient}")
            assert self.reference is not None
            stages.append(self.reference.logprobs(write="ref_logprobs"))
        return stages

    @property
    def kl_coefficient(self) -> float:
        """The present weight of the KL."""
        if self.config.kl_coefficient is None:
            return self.usual_kl_coefficient if self.reference is not None else 0.0
        return self.config.kl_coefficient

    @property
    def with_kl(self) -> bool:
        return self.kl_coefficient != 0.0

    @property
    def kl_in_reward(self) -> bool:
        return self.with_kl and self.config.kl_in == "reward"

    @property
    def needs_old_logprobs(self) -> bool:
        return self.kl_in_reward or self.config.correction.of_step

    @property
    def with_entropy(self) -> bool:
        return self.config.log_entropy or self.config.entropy_coefficient != 0.0

    @property
    def token_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        reads = ["advantages"]
        reads += ["ref_logprobs"] if self.with_kl and not self.kl_in_reward else []
        measured = self.old_logprobs_field != "rollout_logprobs"
        reads += ["rollout_logprobs"] if measured or self.config.correction.is_on else []
        reads += ["correction_weights"] if self.config.correction.of_step else []
        reads += ["staleness", "response_starts"] if measured else []
        return tuple(reads)

    @property
    def prepare_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        reads = ["rewards", "groups", "response_mask"]
        reads += [self.sampling_logprobs_field, "ref_logprobs"] if self.kl_in_reward else []
        return tuple(reads)

    @property
    def sampling_logprobs_field(self) -> str:
        """The policy's log-probabilities before the step, for KL penalties in the reward."""
        return self.old_logprobs_field or "rollout_logprobs"

    def token_kl(self, batch: Batch) -> Tensor:
        """KL estimate of each response token to the reference, ``[num_tokens]``, 0 outside the mask; also reported as
        ``policy/reference_kl``, nats per response."""
        mask = batch["response_mask"].bool()
        difference = batch[self.sampling_logprobs_field] - batch["ref_logprobs"]
        difference = torch.where(mask, difference, 0.0)
        kl = kl_penalty(difference, torch.zeros_like(difference), self.config.kl_estimator)
        everything = torch.ones(batch.num_sequences, dtype=torch.bool)
        per_response = masked_moments(sum_over_tokens(batch, kl), everything, self.dp_group)
        batch.metrics |= {"policy/reference_kl": per_response.mean, "policy/num_responses": per_response.count}
        return kl


def ratio_metrics(inputs: LossInputs, log_ratio: Tensor) -> dict[str, Mean]:
    """Mean ratio, and k3 of KL(old || policy), which is 0 on policy."""
    log_ratio = log_ratio.detach()
    ratio = bounded_exp(log_ratio)
    return {
        "policy/ratio_mean": inputs.token_metric(ratio),
        "policy/approx_kl": inputs.token_metric(k3(log_ratio)),
    }
