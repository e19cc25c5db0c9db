"""`SharedReward`: ask once for each replica of the model, and give every rank of it the same answer.

The ranks of one replica (TP x PP x CP) hold the same samples. If each of them asked a service, it would get
every request many times, and a judge that answers them differently would let the ranks' weights silently diverge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_rl.batch import Sample
from megatron_rl.parallel import ParallelContext
from megatron_rl.parallel.agreement import PeerError
from megatron_rl.rewards.reward import NoReward, Reward, RewardError
from megatron_rl.rewards.weighted import WeightedReward


class SharedReward(Reward):
    """``reward``, computed on the first rank of each replica. Collective over the replica.

    Args:
        context: of the model whose samples are scored.
    """

    def __init__(self, reward: Reward, context: ParallelContext) -> None:
        self.reward = reward
        self.context = context
        self.name = reward.name
        self.has_environment = reward.has_environment

    def __call__(self, samples: Sequence[Sample]) -> list[float | NoReward]:
        outcome: tuple[list[float | NoReward], list[dict[str, float]]] | None = None
        try:
            with self.context.model_agreement.attempt(f"reward {self.name!r}"):
                if self.context.leads_replica:
                    outcome = self.reward(samples), [sample.reward_parts for sample in samples]
        except PeerError as error:  # the same kind of error on every rank of the replica
            raise RewardError(str(error)) from None
        rewards, parts = next(found for found in self.context.gather_objects(outcome, "model") if found is not None)
        for sample, own in zip(samples, parts, strict=True):
            sample.reward_parts = own
        return rewards

    def check_answer(self, answer: Any) -> None:
        self.reward.check_answer(answer)

    def begin(self, samples: Sequence[Sample]) -> None:
        if self.context.leads_replica:
            self.reward.begin(samples)

    def take_metrics(self) -> dict[str, float]:
        return self.reward.take_metrics() if self.context.leads_replica else {}


def share(reward: Reward, context: ParallelContext) -> Reward:
    """``reward`` for the ranks of ``context``: parts with ``once_per_replica`` are computed once a replica."""
    if context.world_size == context.dp_size:
        return reward
    if isinstance(reward, WeightedReward):
        parts = {label: (share(part, context), weight) for label, (part, weight) in reward.parts.items()}
        return WeightedReward(parts, reward.name)
    return SharedReward(reward, context) if reward.once_per_replica else reward
