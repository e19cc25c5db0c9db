"""GRPO with one fault each: what `megatron-rl doctor` must find."""

from __future__ import annotations

import torch

from megatron_rl.algorithms import GRPO
from megatron_rl.algorithms.advantages import spread_over_tokens
from megatron_rl.algorithms.moments import whiten
from megatron_rl.batch import Batch
from megatron_rl.workers.loss import LossInputs, LossOutput, Mean


class AveragedPerMicroBatch(GRPO):
    """The loss is divided by the tokens that the micro-batch happens to hold."""

    def loss(self, inputs: LossInputs) -> LossOutput:
        ratio = (inputs.logprobs - inputs.logprobs.detach()).exp()
        per_token = -ratio * inputs.fields["advantages"] * inputs.mask
        return LossOutput(per_token.sum() / inputs.mask.sum().clamp_min(1.0))


class MaskShiftedUnderContextParallelism(GRPO):
    """The mask is moved by one position, but only where sequences are split."""

    def loss(self, inputs: LossInputs) -> LossOutput:
        fields = dict(inputs.fields)
        if inputs.cp_size > 1:
            fields["response_mask"] = torch.roll(fields["response_mask"], 1)
        shifted = LossInputs(**{**{name: getattr(inputs, name) for name in inputs.__dict__}, "fields": fields})
        return super().loss(shifted)


class MetricCountedTwice(GRPO):
    """A mean over sequences whose sum is taken on every context-parallel rank, and whose weight once."""

    def loss(self, inputs: LossInputs) -> LossOutput:
        output = super().loss(inputs)
        lengths = inputs.sequence_sum(inputs.mask)
        weight = torch.tensor(float(inputs.num_sequences), device=lengths.device) / inputs.cp_size
        return LossOutput(
            output.loss, {**output.metrics, "policy/length": Mean(lengths.sum(), weight)}, output.of_sequences
        )


class WhitenedPerRank(GRPO):
    """Advantages are whitened over this rank's tokens only."""

    def prepare(self, batch: Batch) -> None:
        advantages = spread_over_tokens(batch, batch["rewards"])
        batch.tokens["advantages"] = whiten(advantages, batch["response_mask"].bool(), group=None)


class Raising(GRPO):
    """Not a fault of the layout: it cannot run at all."""

    def prepare(self, batch: Batch) -> None:
        raise ValueError("this algorithm is not finished")
