"""`SFT`: supervised fine-tuning, the negative log-likelihood of given responses."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from megatron_rl.algorithms.aggregation import LossAggregation, token_average
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.offline import OfflineAlgorithm
from megatron_rl.workers.loss import LossInputs, LossOutput


@ALGORITHMS.register("sft")
class SFT(OfflineAlgorithm):
    """-log policy(token) over the tokens whose ``response_mask`` is set."""

    class Config(OfflineAlgorithm.Config):
        """Settings of supervised fine-tuning."""

        loss_aggregation: LossAggregation = "token-mean"
        """How token losses become one number: see `aggregation.token_average`."""
        norm_length: int | None = Field(default=None, gt=0)
        """Constant divisor in tokens of the fixed-length aggregation."""

        @model_validator(mode="after")
        def _check(self) -> Self:
            if self.loss_aggregation == "fixed-length" and not self.norm_length:
                raise ValueError("loss_aggregation='fixed-length' needs norm_length in tokens")
            return self

    name = "sft"
    config: Config

    def loss(self, inputs: LossInputs) -> LossOutput:
        average = token_average(inputs, self.config.loss_aggregation, self.config.norm_length)
        return LossOutput(average(-inputs.logprobs), {"loss/sft": average.metric(-inputs.logprobs)})
