"""DAPO: GRPO with a higher upper clip, token-level averaging, overlong shaping and dynamic sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.advantages import informative_groups, overlong_penalty
from megatron_rl.algorithms.aggregation import LossAggregation
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.batch import Batch, Sample
from megatron_rl.config.ranges import NonNegative


@ALGORITHMS.register("dapo")
class DAPO(GRPO):
    """Decoupled clip and Dynamic sAmpling Policy Optimization (arXiv 2503.14476, eqs. 8 to 13).

    Dynamic sampling is a filter here, `keep_samples`; the trainer samples new prompts until the batch is full
    (`trainer.refill`).
    """

    class Config(GRPO.Config):
        """Settings of DAPO."""

        clip_high: NonNegative = 0.28
        """Upper clip, wider than the lower one so that unlikely tokens can still grow."""
        loss_aggregation: LossAggregation = "token-mean"
        """Every token has the same weight, in long responses too."""
        overlong_tokens: int | None = Field(default=None, gt=0)
        """Response tokens at which the length penalty reaches its full size; none: no penalty."""
        overlong_cache: int = Field(default=4096, gt=0)
        """Tokens before that over which the penalty grows linearly; at most overlong_tokens."""
        overlong_weight: NonNegative = 1.0
        """Size of the full penalty, in units of reward."""
        dynamic_sampling: bool = True
        """Drop groups whose rewards are all equal, and sample new prompts in their place."""
        max_sampling_rounds: int = Field(default=10, ge=1)
        """Most rounds of sampling in a step; a batch that is not full after them is trained on as it is."""

        @model_validator(mode="after")
        def _penalty_starts_within_the_response(self) -> Self:
            if self.overlong_tokens is not None and self.overlong_cache > self.overlong_tokens:
                raise ValueError(
                    f"overlong_cache={self.overlong_cache} is above overlong_tokens={self.overlong_tokens}, so even an "
                    "empty response would be penalised: set both, for example a quarter of the tokens as cache"
                )
            return self

    name = "dapo"
    config: Config

    def shaped_rewards(self, batch: Batch) -> Tensor:
        rewards = super().shaped_rewards(batch)
        if self.config.overlong_tokens is None:
            return rewards
        # from the samples: with mask_truncated the mask of the longest responses is empty by now
        lengths = torch.tensor([sum(sample.mask) for sample in batch.samples])
        penalty = overlong_penalty(lengths, self.config.overlong_tokens, self.config.overlong_cache)
        return rewards + self.config.overlong_weight * penalty

    @property
    def drops_samples(self) -> bool:  # type: ignore[override]
        return self.config.dynamic_sampling

    @property
    def max_sampling_rounds(self) -> int:  # type: ignore[override]
        return self.config.max_sampling_rounds

    def keep_samples(self, samples: Sequence[Sample]) -> list[bool]:
        if not self.config.dynamic_sampling:
            return super().keep_samples(samples)
        rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
        groups = torch.tensor([sample.group for sample in samples], dtype=torch.int64)
        return informative_groups(rewards, groups).tolist()
