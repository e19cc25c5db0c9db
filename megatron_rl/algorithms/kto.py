"""KTO and BCO: learning from single responses that are labelled good or bad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import sum_over_tokens
from megatron_rl.algorithms.aggregation import answered, answered_metric, sequence_average
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.kto_pairing import exchange_responses
from megatron_rl.algorithms.logistic import logistic_loss
from megatron_rl.algorithms.moments import masked_moments
from megatron_rl.algorithms.offline import OfflineAlgorithm, RunningMean
from megatron_rl.batch import Batch
from megatron_rl.config.ranges import NonNegative, Positive
from megatron_rl.dataflow import Stage
from megatron_rl.workers.loss import LossInputs, LossOutput, Mean


class LabelledAlgorithm(OfflineAlgorithm):
    """Shared by KTO and BCO: sequence field ``labels`` (bool, True = desirable), log-ratios to a reference."""

    class Config(OfflineAlgorithm.Config):
        """Settings of algorithms on labelled responses."""

        beta: Positive = 0.1
        """Strength of the tie to the reference."""
        desirable_weight: NonNegative = 1.0
        """Weight of the desirable responses' losses."""
        undesirable_weight: NonNegative = 1.0
        """Weight of the undesirable responses' losses."""
        precomputed_reference: bool = False
        """Batches already hold ``ref_logprobs``, in a flow of your own; the one-call trainers have
        ``reference_cache``."""

    config: Config
    token_reads = ("ref_logprobs",)
    sequence_reads: tuple[str, ...] = ("labels",)

    def response_loss(self, rewards: Tensor, labels: Tensor, inputs: LossInputs) -> Tensor:
        """Loss of each response before its class's weight; ``[num_sequences]``."""
        raise NotImplementedError

    def loss(self, inputs: LossInputs) -> LossOutput:
        labels = inputs.sequences["labels"].bool()
        ratio = inputs.masked(inputs.logprobs) - inputs.masked(inputs.fields["ref_logprobs"])
        rewards = self.config.beta * inputs.sequence_sum(ratio)
        good, bad = self.config.desirable_weight, self.config.undesirable_weight
        weights = torch.where(labels, rewards.new_tensor(good), rewards.new_tensor(bad))
        per_sequence = weights * self.response_loss(rewards, labels, inputs)
        metrics = {f"loss/{self.name}": answered_metric(inputs, per_sequence), **label_metrics(inputs, rewards, labels)}
        return LossOutput(sequence_average(inputs, per_sequence), metrics, of_sequences=True)

    def optimize_actor(self, batch: Batch) -> dict[str, float]:
        return with_margins(super().optimize_actor(batch))

    def evaluate(self, batch: Batch) -> dict[str, float]:
        return with_margins(super().evaluate(batch))

    def forward_stages(self) -> list[Stage]:
        if self.config.precomputed_reference:
            return []
        self.require("reference", "the log-ratio (unless precomputed_reference is set)")
        assert self.reference is not None
        return [self.reference.logprobs(write="ref_logprobs")]


@ALGORITHMS.register("kto")
class KTO(LabelledAlgorithm):
    """Kahneman-Tversky Optimization (arXiv 2402.01306, section 4): w_y (1 - sigmoid(+-(r - beta z))).

    r = beta log(policy / reference) of the response; z is the KL of policy to reference, estimated before the step as
    the mean log-ratio of *mismatched* responses (those to other prompts of the whole batch, see
    `kto_pairing.mismatched_indices`), not below 0 and without gradient. A batch with one prompt only is refused (as
    TRL refuses a batch size of 1): z would silently be 0.
    """

    class Config(LabelledAlgorithm.Config):
        """Settings of KTO."""

        estimate_kl: bool = True
        """Estimate z, with two more forward passes a step; off: z = 0, as APO-zero on single responses."""

    name = "kto"
    config: Config

    def response_loss(self, rewards: Tensor, labels: Tensor, inputs: LossInputs) -> Tensor:
        shift = self.config.beta * inputs.sequences["kl_logratio"] if self.config.estimate_kl else 0.0
        return torch.sigmoid(torch.where(labels, -(rewards - shift), rewards - shift))

    @property
    def sequence_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("labels", "kl_logratio") if self.config.estimate_kl else ("labels",)

    def forward_stages(self) -> list[Stage]:
        if not self.config.estimate_kl:
            return super().forward_stages()
        self.require("reference", "the KL of mismatched responses (unless estimate_kl is off)")
        reads = ("input_ids", "response_mask")
        estimate = Stage("kto.mismatched_kl", self.estimate_kl, reads=reads, writes=("kl_logratio",), place="actor")
        return [*super().forward_stages(), estimate]

    def estimate_kl(self, batch: Batch) -> None:
        """Write ``kl_logratio``, the same number for every sequence of all ranks.

        Raises:
            ConfigError: the whole batch has one prompt only.
        """
        assert self.reference is not None
        other, mismatched = exchange_responses(batch, self.dp_group)
        self.actor.logprobs(write="logprobs").run(other)
        self.reference.logprobs(write="ref_logprobs").run(other)
        ratios = sum_over_tokens(other, other["logprobs"] - other["ref_logprobs"])
        lengths = sum_over_tokens(other, torch.ones_like(ratios[:1]).expand(other.num_tokens))
        mean = max(masked_moments(ratios, mismatched & (lengths > 0), self.dp_group).mean, 0.0)
        batch.sequences["kl_logratio"] = torch.full((batch.num_sequences,), mean)
        batch.metrics["kto/kl"] = mean


@ALGORITHMS.register("bco")
class BCO(LabelledAlgorithm):
    """Binary Classifier Optimization (arXiv 2404.04656, section 3): -log sigmoid(+-(r - d)), d a mean reward.

    d is the running mean, over the steps *before* this one, of the mean reward of all responses of a step, so that it
    depends neither on micro-batches nor on ranks. Classes are weighted by their size (by one half each in the
    paper, the same where they are balanced). No density-ratio weights.
    """

    class Config(LabelledAlgorithm.Config):
        """Settings of BCO."""

    name = "bco"
    config: Config

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.mean_reward = RunningMean()

    def response_loss(self, rewards: Tensor, labels: Tensor, inputs: LossInputs) -> Tensor:
        shifted = rewards - self.mean_reward.value
        return logistic_loss(torch.where(labels, shifted, -shifted))

    def observe(self, metrics: Mapping[str, float]) -> None:
        if "rewards/mean" in metrics:
            self.mean_reward.update(metrics["rewards/mean"])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"mean_reward": self.mean_reward.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.mean_reward.load_state_dict(state["mean_reward"])


def with_margins(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics and, where there were responses of both classes, ``rewards/margins``: mean reward of the desirable
    ones minus that of the undesirable ones (as TRL's KTOTrainer logs it)."""
    if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
        metrics = metrics | {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}
    return metrics


def label_metrics(inputs: LossInputs, rewards: Tensor, labels: Tensor) -> dict[str, Mean]:
    """Mean rewards of the desirable (chosen) and undesirable (rejected) responses, and of all; ``accuracies`` is the
    share whose reward has the sign of its label."""
    present = answered(inputs)
    kind = rewards.dtype
    return {
        "rewards/chosen": inputs.sequence_metric(rewards, (present & labels).to(kind)),
        "rewards/rejected": inputs.sequence_metric(rewards, (present & ~labels).to(kind)),
        "rewards/mean": inputs.sequence_metric(rewards, present.to(kind)),
        "rewards/accuracies": inputs.sequence_metric(((rewards > 0) == labels).to(kind), present.to(kind)),
    }
