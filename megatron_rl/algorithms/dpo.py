"""DPO and its relatives: the policy itself as the reward model, relative to a frozen reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from pydantic import model_validator
from torch import Tensor

from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.bounds import NonNegative, refuse_unused
from megatron_rl.algorithms.offline import OfflineAlgorithm, PairwiseAlgorithm
from megatron_rl.algorithms.pairs import PAIR_LOSSES, SMOOTHED, Pairs, PairSettings
from megatron_rl.algorithms.running_mean import RunningMean
from megatron_rl.dataflow import Stage
from megatron_rl.workers.loss import LossInputs


@ALGORITHMS.register("dpo")
class DPO(PairwiseAlgorithm):
    """Direct Preference Optimization (arXiv 2305.18290) with any loss of `PAIR_LOSSES`, or a weighted mixture of them.

    Log-probabilities are sums over response tokens. Pairs count equally; one whose both responses are empty counts
    not at all. bco_pair is shifted by the running mean reward of the steps *before* this one, so that it depends
    neither on micro-batches nor on ranks (TRL 1.16 does not shift it at all).
    """

    class Config(OfflineAlgorithm.Config, PairSettings):
        """Settings of DPO."""

        loss: str | dict[str, NonNegative] = "sigmoid"
        """Name of a preference loss, or names with their weights: {"sigmoid": 0.8, "sft": 0.2}."""
        reference_free: bool = False
        """Treat the reference as uniform: its log-probabilities are 0."""
        precomputed_reference: bool = False
        """Batches of your own flow bring ``ref_logprobs``; the one-call trainers have ``reference_cache`` instead."""

        @property
        def weights(self) -> dict[str, float]:
            return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss

        @model_validator(mode="after")
        def _check(self) -> Self:
            for name in self.weights:
                PAIR_LOSSES[name]
            if not self.weights:
                raise ValueError("loss={} has no term: name at least one preference loss")
            self._refuse_ignored()
            if "exo_pair" in self.weights and not self.label_smoothing:
                raise ValueError(
                    "exo_pair needs label_smoothing above 0 (1e-3 is usual): its target has log(smoothing)"
                )
            return self

        def _refuse_ignored(self) -> None:
            # sft compares no labels; exo_pair cannot be without smoothing, whatever stands beside it
            deaf = [name for name in self.weights if name not in (*SMOOTHED, "sft")]
            if self.label_smoothing and "exo_pair" not in self.weights and (deaf or set(self.weights) == {"sft"}):
                raise ValueError(
                    f"label_smoothing={self.label_smoothing} has no effect on {deaf or ['sft']}; it is for "
                    f"{list(SMOOTHED)}, alone or with sft"
                )
            for field, loss in {"ipo_length_norm": "ipo", "discopop_tau": "discopop"}.items():
                if loss not in self.weights:
                    refuse_unused(self, f"loss={self.loss!r}", **{field: f"it is for {loss}"})

    name = "dpo"
    config: Config

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.mean_reward = RunningMean()

    def pair_loss(self, pairs: Pairs) -> dict[str, Tensor]:
        return {name: weight * PAIR_LOSSES[name](pairs, self.config) for name, weight in self.config.weights.items()}

    def pair_rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return self.config.beta * pairs.chosen_ratio, self.config.beta * pairs.rejected_ratio

    def pairs_of(self, inputs: LossInputs) -> Pairs:
        return replace(super().pairs_of(inputs), shift=self.mean_reward.value)

    def forward_stages(self) -> list[Stage]:
        if self.config.reference_free or self.config.precomputed_reference:
            return []
        self.require("reference", "the log-ratio (unless reference_free or precomputed_reference is set)")
        assert self.reference is not None
        return [self.reference.logprobs(write="ref_logprobs")]

    @property
    def token_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.config.reference_free else ("ref_logprobs",)

    def observe(self, metrics: Mapping[str, float]) -> None:
        if "bco_pair" in self.config.weights and "rewards/chosen" in metrics:
            self.mean_reward.update(0.5 * (metrics["rewards/chosen"] + metrics["rewards/rejected"]))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"mean_reward": self.mean_reward.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.mean_reward.load_state_dict(state["mean_reward"])
