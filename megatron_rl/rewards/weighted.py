"""`WeightedReward`: several rewards as one weighted sum, each kept unweighted in `Sample.reward_parts`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_rl.batch import Sample
from megatron_rl.config import ConfigError
from megatron_rl.rewards.reward import Reward


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

    def score(self, samples: Sequence[Sample]) -> Sequence[float]:
        columns = [[weight * value for value in reward(samples)] for reward, weight in self.parts.values()]
        return [math.fsum(row) for row in zip(*columns, strict=True)]

    def note(self, samples: Sequence[Sample], rewards: Sequence[float]) -> None:
        """Nothing: each part has kept its own, and the sum becomes ``Sample.reward``."""
