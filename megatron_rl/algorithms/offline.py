"""`OfflineAlgorithm` and `PairwiseAlgorithm`: base classes of algorithms that learn from a data set, without sampling.

Their batches arrive packed (`Batch.from_sequences`). In preference batches sequence 2i is chosen and 2i + 1 rejected;
a pair never leaves its micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from megatron_rl.algorithms.base import BaseAlgorithm
from megatron_rl.algorithms.pairs import Pairs
from megatron_rl.batch import Batch
from megatron_rl.config import ConfigRecord
from megatron_rl.config.ranges import Seed
from megatron_rl.dataflow import Flow, Stage
from megatron_rl.workers.loss import LossInputs, LossOutput, Mean


class OfflineAlgorithm(BaseAlgorithm):
    """Learns from given responses: no sampling, no rewards, no old policy."""

    class Config(ConfigRecord):  # type: ignore[override,misc,assignment]
        """Settings of algorithms on fixed data."""

        num_epochs: int = Field(default=1, ge=1)
        """Passes over one batch."""
        num_mini_batches: int = Field(default=1, ge=1)
        """Optimizer steps per pass over one batch."""
        seed: Seed = 0
        """Seed of the shuffling into mini-batches."""

    token_reads: tuple[str, ...] = ()
    old_logprobs_field = None

    def update(self) -> Flow:
        """One step as a flow: work on the data, forward passes without gradient, optimise."""
        return Flow((*self.data_stages(), *self.forward_stages(), *self.optimize_stages()))

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Loss and metrics on a batch that is not trained on, over all ranks. Collective."""

        def measure(batch: Batch) -> None:
            metrics = self.actor.measure(
                batch,
                self.loss,
                reads=self.loss_fields,
                sequence_reads=self.sequence_reads,
                with_entropy=self.with_entropy,
                group_field=self.group_field,
            )
            batch.metrics.update(metrics)

        last = self.loss_stage("actor.measure", measure, self.optimize_reads)
        for stage in (*self.data_stages(), *self.forward_stages(), last):
            stage.execute(batch, self.actor.context.agreement)
        return batch.metrics

    def data_stages(self) -> list[Stage]:
        """Work on the batch alone, before the forward passes."""
        return []

    def forward_stages(self) -> list[Stage]:
        return []


class PairwiseAlgorithm(OfflineAlgorithm):
    """A loss per pair of a chosen and a rejected response; subclasses give `pair_loss` and `pair_rewards`."""

    name = "preference"
    group_field = "pairs"

    def pair_loss(self, pairs: Pairs) -> dict[str, Tensor]:
        """Terms of the loss by name, each ``[num_pairs]`` and already weighted; their sum is minimised."""
        raise NotImplementedError

    def pair_rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Implicit rewards of the chosen and the rejected responses, ``[num_pairs]``, for metrics."""
        raise NotImplementedError

    def loss(self, inputs: LossInputs) -> LossOutput:
        pairs = self.pairs_of(inputs)
        terms = self.pair_loss(pairs)
        per_pair = torch.where(pairs.present, torch.stack(list(terms.values())).sum(0), 0.0)
        metrics = {f"loss/{name}": pair_metric(inputs, pairs, term) for name, term in terms.items()}
        metrics["loss/preference"] = pair_metric(inputs, pairs, per_pair)
        return LossOutput(
            per_pair.sum() / max(inputs.totals.groups, 1.0),
            metrics | self.pair_metrics(inputs, pairs),
            of_sequences=True,
        )

    def pairs_of(self, inputs: LossInputs) -> Pairs:
        """Sums over the responses of this micro-batch's pairs."""
        assert inputs.num_sequences % 2 == 0, "a pair was split over micro-batches"
        logprobs = inputs.sequence_sum(self.weighed(inputs, inputs.logprobs))
        num_tokens = inputs.sequence_sum(inputs.mask)
        reference = torch.zeros_like(logprobs)
        if "ref_logprobs" in inputs.fields:
            reference = inputs.sequence_sum(self.weighed(inputs, inputs.fields["ref_logprobs"]))
        return Pairs.of_sequences(logprobs, reference, num_tokens)

    def weighed(self, inputs: LossInputs, per_token: Tensor) -> Tensor:
        """Weighted log-probabilities, which are then summed over each response; 0 off the mask; ``[num_tokens]``."""
        return inputs.masked(per_token)

    def pair_metrics(self, inputs: LossInputs, pairs: Pairs) -> dict[str, Mean]:
        chosen, rejected = (reward.detach() for reward in self.pair_rewards(pairs))
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
        }
        return {name: pair_metric(inputs, pairs, value) for name, value in values.items()}

    def data_stages(self) -> list[Stage]:
        def run(batch: Batch) -> None:
            if batch.num_sequences % 2:
                raise ValueError(
                    f"a preference batch has {batch.num_sequences} sequences: expected chosen, rejected, chosen, ..."
                )
            batch.sequences["pairs"] = torch.arange(batch.num_sequences) // 2

        return [Stage("batch.pair", run, ("input_ids", "response_mask"), ("pairs",), place="host", collective=False)]


class RunningMean:
    """The mean of a metric over all steps so far: 0 before the first, every step counts the same."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def update(self, measured: float) -> None:
        self.count += 1
        self.value += (measured - self.value) / self.count

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "count": float(self.count)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value, self.count = float(state["value"]), int(state["count"])


def pair_metric(inputs: LossInputs, pairs: Pairs, per_pair: Tensor) -> Mean:
    """Mean over the pairs with any response token."""
    return inputs.sequence_metric(torch.where(pairs.present, per_pair, 0.0), pairs.present.to(per_pair.dtype))
