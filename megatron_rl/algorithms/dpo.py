"""DPO and its variants: the policy itself as the reward model, relative to a frozen reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import Tensor

from megatron_rl.algorithms.advantages import sum_over_tokens
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.offline import OfflineAlgorithm, PairwiseAlgorithm, RunningMean
from megatron_rl.algorithms.pair_fields import length_weights, matched_over_ranks
from megatron_rl.algorithms.pairs import OF_MARGINS, PAIR_LOSSES, SMOOTHED, FDivergence, PairConfig, Pairs
from megatron_rl.algorithms.unused_fields import refuse_unused
from megatron_rl.batch import Batch
from megatron_rl.config.ranges import Fraction, NonNegative, OpenFraction
from megatron_rl.dataflow import Stage
from megatron_rl.workers.loss import LossInputs

MATCHES = {"matched_reference": "aot", "matched_rejected": "aot_unpaired", "matched_chosen": "aot_unpaired"}


@ALGORITHMS.register("dpo")
class DPO(PairwiseAlgorithm):
    """Direct Preference Optimization (arXiv 2305.18290) with any loss of `PAIR_LOSSES`, or a weighted mixture of them.

    Log-probabilities are sums over response tokens. Pairs have equal weight; a pair of two empty responses has
    none. bco_pair is shifted by the running mean reward of the steps *before* this one, so that it depends
    neither on micro-batches nor on ranks (TRL 1.16 does not shift it at all). aot and aot_unpaired match over all pairs
    of a step, with one more forward pass before it; several optimizer steps on a batch use the same matches.
    """

    class Config(OfflineAlgorithm.Config, PairConfig):
        """Settings of DPO."""

        loss: str | dict[str, NonNegative] = "sigmoid"
        """Name of a preference loss, or names with their weights: {"sigmoid": 0.8, "sft": 0.2}."""
        reference_free: bool = False
        """Treat the reference as uniform: its log-probabilities are 0."""
        f_divergence: FDivergence = "reverse_kl"
        """Divergence between policy and reference, for losses of the margin: reverse_kl is DPO."""
        f_alpha: OpenFraction = 0.5
        """Power of the alpha divergence: towards 0 the reverse KL, towards 1 the forward KL."""
        ld_alpha: Fraction = 1.0
        """Weight of a response's tokens beyond the length of the pair's shorter one: LD-DPO (arXiv 2409.06411)."""
        precomputed_reference: bool = False
        """Batches already hold ``ref_logprobs``, in a flow of your own; the one-call trainers have
        ``reference_cache``."""

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
            # sft has no labels to smooth; exo_pair always needs smoothing, whatever it is combined with
            unaffected = [name for name in self.weights if name not in (*SMOOTHED, "sft")]
            if self.label_smoothing and "exo_pair" not in self.weights and (unaffected or set(self.weights) == {"sft"}):
                raise ValueError(
                    f"label_smoothing={self.label_smoothing} has no effect on {unaffected or ['sft']}; it is for "
                    f"{list(SMOOTHED)}, alone or with sft"
                )
            for field, loss in {"ipo_length_norm": "ipo", "discopop_tau": "discopop"}.items():
                if loss not in self.weights:
                    refuse_unused(self, f"loss={self.loss!r}", **{field: f"it is for {loss}"})
            if self.f_divergence != "alpha":
                refuse_unused(self, f"f_divergence={self.f_divergence!r}", f_alpha="it is for alpha")
            others = [name for name in self.weights if name not in (*OF_MARGINS, "sft")]
            if others:
                refuse_unused(self, f"loss={others}", f_divergence=f"it is for {list(OF_MARGINS)}")
            if "sft" in self.weights:
                refuse_unused(self, "sft", ld_alpha="its likelihood is of the whole response")

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
        given = {name: inputs.sequences[name] for name in MATCHES if name in inputs.sequences}
        return replace(
            super().pairs_of(inputs),
            shift=self.mean_reward.value,
            divergence=self.config.f_divergence,
            alpha=self.config.f_alpha,
            **{name: value[0::2] for name, value in given.items()},
        )

    def weighed(self, inputs: LossInputs, per_token: Tensor) -> Tensor:
        kept = super().weighed(inputs, per_token)
        return kept if self.config.ld_alpha == 1.0 else kept * inputs.masked(inputs.fields["length_weights"])

    def data_stages(self) -> list[Stage]:
        if self.config.ld_alpha == 1.0:
            return super().data_stages()
        reads = ("input_ids", "response_mask")
        weigh = Stage("dpo.length_weights", self.weigh_lengths, reads, ("length_weights",), "host", collective=False)
        return [*super().data_stages(), weigh]

    def weigh_lengths(self, batch: Batch) -> None:
        """Write the token field ``length_weights``."""
        batch.tokens["length_weights"] = length_weights(batch, self.config.ld_alpha)

    def forward_stages(self) -> list[Stage]:
        stages = []
        if not (self.config.reference_free or self.config.precomputed_reference):
            self.require("reference", "the log-ratio (unless reference_free or precomputed_reference is set)")
            assert self.reference is not None
            stages.append(self.reference.logprobs(write="ref_logprobs"))
        if self.sequence_reads:
            reads = ("input_ids", "response_mask", *self.token_reads)
            stages.append(Stage("dpo.match", self.match, reads=reads, writes=self.sequence_reads, place="actor"))
        return stages

    def match(self, batch: Batch) -> None:
        """Write the matches of aot and aot_unpaired over the pairs of all data-parallel ranks, the same value for both
        sequences of a pair. Collective."""
        self.actor.logprobs(write="policy_logprobs").run(batch)
        policy = self._response_sums(batch, batch.tokens.pop("policy_logprobs"))
        reference = torch.zeros_like(policy)
        if not self.config.reference_free:
            reference = self._response_sums(batch, batch["ref_logprobs"])
        counts = sum_over_tokens(batch, torch.ones(batch.num_tokens)).view(-1, 2)
        present, ratios = counts.sum(1) > 0, policy - reference
        chosen, rejected = ratios[:, 0], ratios[:, 1]
        sides = {
            "matched_reference": (policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]),
            "matched_rejected": (chosen, rejected),
            "matched_chosen": (rejected, chosen),
        }
        for name in self.sequence_reads:
            found = matched_over_ranks(*sides[name], present, self.dp_group)
            batch.sequences[name] = found.repeat_interleave(2)

    def _response_sums(self, batch: Batch, logprobs: Tensor) -> Tensor:
        """``[num_pairs, 2]``"""
        weights = batch["length_weights"] if self.config.ld_alpha != 1.0 else 1.0
        return sum_over_tokens(batch, logprobs * weights).view(-1, 2)

    @property
    def token_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        reads = () if self.config.reference_free else ("ref_logprobs",)
        return reads if self.config.ld_alpha == 1.0 else (*reads, "length_weights")

    @property
    def sequence_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name, loss in MATCHES.items() if loss in self.config.weights)

    def observe(self, metrics: Mapping[str, float]) -> None:
        if "bco_pair" in self.config.weights and "rewards/chosen" in metrics:
            self.mean_reward.update(0.5 * (metrics["rewards/chosen"] + metrics["rewards/rejected"]))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"mean_reward": self.mean_reward.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.mean_reward.load_state_dict(state["mean_reward"])
