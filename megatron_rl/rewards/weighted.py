"""`WeightedReward`: several rewards as one weighted sum, each kept unweighted in `Sample.reward_parts`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.batch import Sample
from megatron_rl.config import ConfigError
from megatron_rl.rewards.reward import NoReward, Reward


class WeightedReward(Reward):
    """The sum of ``weight * reward`` over its parts.

    Args:
        parts: reward and weight by the name under which the reward is logged.

    Raises:
        ConfigError: there is no part, or a weight is not finite.
    """

    def __init__(self, parts: Mapping[str, tuple[Reward, float]], name: str = "weighted") -> None:
        if not parts:
            raise ConfigError("a weighted reward needs at least one part")
        for label, (reward, weight) in parts.items():
            if not math.isfinite(weight):
                raise ConfigError(f"the weight of reward {label!r} is {weight}, expected a finite number")
            reward.name = label
        self.parts = dict(parts)
        self.name = name

    @property
    def place(self) -> str:  # type: ignore[override]
        """Where its parts run."""
        places = {reward.place for reward, _ in self.parts.values()}
        return next(iter(places - {Reward.place}), Reward.place)

    @property
    def has_environment(self) -> bool:  # type: ignore[override]
        """Whether one of its parts is what an environment gave."""
        return any(reward.has_environment for reward, _ in self.parts.values())

    def score(self, samples: Sequence[Sample]) -> Sequence[float | NoReward]:
        weights = [weight for _, weight in self.parts.values()]
        columns = [reward(samples) for reward, _ in self.parts.values()]
        return [_sum(weights, row) for row in zip(*columns, strict=True)]

    def check_answer(self, answer: Any) -> None:
        for reward, _ in self.parts.values():
            reward.check_answer(answer)

    def begin(self, samples: Sequence[Sample]) -> None:
        for reward, _ in self.parts.values():
            reward.begin(samples)

    def note(self, samples: Sequence[Sample], rewards: Sequence[float | NoReward]) -> None:
        """Nothing: each part keeps its own reward, and the sum becomes ``Sample.reward``."""

    def take_metrics(self) -> dict[str, float]:
        return {name: value for reward, _ in self.parts.values() for name, value in reward.take_metrics().items()}


def _sum(weights: Sequence[float], row: Sequence[float | NoReward]) -> float | NoReward:
    """A sample that lacks one of its rewards has no sum: leaving a part out would be a reward of 0 for it."""
    absent = next((value for value in row if isinstance(value, NoReward)), None)
    if absent is not None:
        return absent
    return math.fsum(weight * value for weight, value in zip(weights, row, strict=True) if isinstance(value, float))
