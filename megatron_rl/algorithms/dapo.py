"""DAPO: GRPO with a higher upper clip, token-level averaging, overlong shaping and dynamic sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from megatron_rl.algorithms.advantages import informative_groups, overlong_penalty
from megatron_rl.algorithms.aggregation import LossAggregation
from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.batch import Batch, Sample


@ALGORITHMS.register("dapo")
class DAPO(GRPO):
    """Decoupled clip and Dynamic sAmpling Policy Optimization (arXiv 2503.14476, eqs. 8 to 13).

    Dynamic sampling is a predicate here, `keep_samples`; drawing new prompts until the batch is full is the trainer's
    (`trainer.refill`).
    """

    class Config(GRPO.Config):
        """Settings of DAPO."""

        clip_high: float = 0.28
        """Upper clip, wider than the lower one so that unlikely tokens can still grow."""
        loss_aggregation: LossAggregation = "token-mean"
        """Every token weighs the same, in long responses too."""
        overlong_tokens: int | None = None
        """Response tokens at which the length penalty reaches its full size; none: no penalty."""
        overlong_cache: int = 4096
        """Tokens before that over which the penalty grows linearly."""
        overlong_weight: float = 1.0
        """Size of the full penalty, in units of reward."""
        dynamic_sampling: bool = True
        """Drop groups whose rewards are all equal, and sample new prompts in their place."""
        max_sampling_rounds: int = Field(default=10, ge=1)
        """Rounds of sampling a step; a batch that is not full then is trained on as it is."""

    name = "dapo"
    config: Config

    def shaped_rewards(self, batch: Batch) -> Tensor:
        rewards = super().shaped_rewards(batch)
        if self.config.overlong_tokens is None:
            return rewards
        lengths = torch.zeros(batch.num_sequences).index_add(0, batch.sequence_ids, batch["response_mask"].float())
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
