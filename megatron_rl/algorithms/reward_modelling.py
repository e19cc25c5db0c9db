"""`RewardModelling`: a value head trained on preference pairs, the Bradley-Terry model.

A sequence's reward is the value head's output at its last token: see `batch.value_tokens`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor

from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.logistic import logistic_loss
from megatron_rl.algorithms.offline import OfflineAlgorithm, PairwiseAlgorithm
from megatron_rl.algorithms.pairs import Pairs
from megatron_rl.algorithms.roles import Policy, ValueSource
from megatron_rl.batch import Batch
from megatron_rl.batch.value_tokens import append_value_tokens
from megatron_rl.config.ranges import NonNegative
from megatron_rl.dataflow import Stage
from megatron_rl.workers.loss import LossInputs


@ALGORITHMS.register("reward-model")
class RewardModelling(PairwiseAlgorithm):
    """-log sigmoid(r_chosen - r_rejected - margin) (+ centering): Bradley-Terry as in InstructGPT (arXiv
    2203.02155, eq. 1), the margin as in Llama 2 (arXiv 2307.09288, eq. 2)."""

    class Config(OfflineAlgorithm.Config):
        """Settings of reward modelling."""

        use_margins: bool = False
        """Batches bring the sequence field ``margins``, the same number for both responses of a pair."""
        center_coefficient: NonNegative = 0.0
        """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv 2312.09244, eq. 2)."""
        pad_token_id: int | None = Field(default=None, ge=0)
        """Trailing tokens of this id do not count, as in Hugging Face's classifiers, which look for the last token that
        is not padding: where pad is eos, the reward is read at the token before. None: the last token counts always."""

    name = "reward-model"
    config: Config

    def __init__(self, model: ValueSource, config: Any = None, **overrides: Any) -> None:
        """``model``: a `Critic`, the model with a value head."""
        super().__init__(actor=cast(Policy, model), config=config, **overrides)

    def pairs_of(self, inputs: LossInputs) -> Pairs:
        """Rewards take the place of log-probabilities, margins that of the chosen response's reference."""
        assert inputs.values is not None, "the worker of a reward model passes values"
        rewards = inputs.sequence_sum(inputs.masked(inputs.values))
        margins = torch.zeros_like(rewards)
        if self.config.use_margins:
            margins[0::2] = inputs.sequences["margins"][0::2].to(rewards.dtype)
        return Pairs.of_sequences(rewards, margins, inputs.sequence_sum(inputs.mask).to(rewards.dtype))

    def pair_loss(self, pairs: Pairs) -> dict[str, Tensor]:
        terms = {"bradley_terry": logistic_loss(pairs.margin)}
        if self.config.center_coefficient:
            terms["centering"] = self.config.center_coefficient * (pairs.chosen + pairs.rejected).square()
        return terms

    def pair_rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return pairs.chosen, pairs.rejected

    @property
    def sequence_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("margins",) if self.config.use_margins else ()

    def data_stages(self) -> list[Stage]:
        writes = ("input_ids", "response_mask")
        return [
            *super().data_stages(),
            Stage("batch.value_tokens", self.append_value_tokens, writes, writes, place="host", collective=False),
        ]

    def append_value_tokens(self, batch: Batch) -> None:
        """See `batch.value_tokens`."""
        append_value_tokens(batch, self.config.pad_token_id)
