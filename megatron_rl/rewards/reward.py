"""`Reward`: samples in, one finite number or one `NoReward` each out; and `FunctionReward`, made of a function.

    def polite(sample: Sample) -> float:
        return float("please" in sample.response_text)

    reward = FunctionReward(polite)
    reward(samples)  # [1.0, 0.0, ...], and each sample.reward_parts["polite"] is set

What a reward returns is checked here, once, so that NaN never reaches an advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from megatron_rl.batch import Sample
from megatron_rl.config import ConfigRecord
from megatron_rl.registry import Registry

HEAD_CHARS = 60  # of a prompt or response in an error message


class RewardError(RuntimeError):
    """A reward that raised, or returned something that is not one finite number for each sample."""


@dataclass(frozen=True, slots=True)
class NoReward:
    """In place of a number: this sample has no reward. `RewardModel.score` drops the sample and counts it."""

    reason: str  # for the log


class Reward:
    """One way to score samples. Subclasses override `score_one`, or `score` where a whole batch is cheaper.

    ``name`` stands in logs and in `Sample.reward_parts`.
    """

    class Config(ConfigRecord):
        """Options, from YAML or keyword arguments."""

    name: str = "reward"
    once_per_replica: bool = False  # ask once for each replica of the model: for what costs, or answers differently
    has_environment: bool = False  # it is, or holds, what an environment gave
    place: str = "host"  # where it runs; anything but "host" may hold collectives of the training ranks

    def score_one(self, sample: Sample) -> float | NoReward:
        """The reward of one sample; any finite number, or `NoReward`."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither score_one nor score")

    def score(self, samples: Sequence[Sample]) -> Sequence[float | NoReward]:
        """The rewards of ``samples``, in their order."""
        return [self._score_named(sample) for sample in samples]

    def check_answer(self, answer: Any) -> None:
        """Called for the answer of every prompt before a run begins.

        Raises:
            ValueError: this reward cannot be computed for it; the message says why.
        """

    def begin(self, samples: Sequence[Sample]) -> None:
        """Called before these samples are scored: requests that can run in the background start now."""

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call, by metric name."""
        return {}

    def __call__(self, samples: Sequence[Sample]) -> list[float | NoReward]:
        """Score, check, and note the result in each sample's ``reward_parts[self.name]``.

        Raises:
            RewardError: the reward raised, or returned too few or too many values, or one that is not a finite number;
                the message names the sample.
        """
        if not samples and self.place == "host":  # elsewhere other ranks may have samples, and wait for this one
            return []
        try:
            values = self.score(samples)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {error}; it was scoring {len(samples)} samples"
                + (f", the first of them {describe(samples[0])}" if samples else "")
            ) from error
        rewards = _checked(self.name, samples, values)
        self.note(samples, rewards)
        return rewards

    def note(self, samples: Sequence[Sample], rewards: Sequence[float | NoReward]) -> None:
        """Keep each reward on its sample under this reward's name."""
        for sample, value in zip(samples, rewards, strict=True):
            if not isinstance(value, NoReward):
                sample.reward_parts[self.name] = value

    def with_environment(
        self, samples: Sequence[Sample], rewards: Sequence[float | NoReward]
    ) -> list[float | NoReward]:
        """``rewards`` of this reward, and what an environment gave these samples (`Sample.environment_reward`)."""
        if self.has_environment:
            return list(rewards)
        return [
            value if isinstance(value, NoReward) else value + (sample.environment_reward or 0.0)
            for sample, value in zip(samples, rewards, strict=True)
        ]

    def _score_named(self, sample: Sample) -> float | NoReward:
        try:
            return self.score_one(sample)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {error}; sample: {describe(sample)}"
            ) from error


REWARDS: Registry[type[Reward]] = Registry("reward")


class FunctionReward(Reward):
    """A function ``Sample -> float``, or with ``batched`` a function ``list[Sample] -> list[float]`` (or a tensor)."""

    def __init__(self, function: Callable[[Any], Any], name: str | None = None, batched: bool = False) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))  # partials have no name
        self.batched = batched

    def score_one(self, sample: Sample) -> float | NoReward:
        return self.function(sample)

    def score(self, samples: Sequence[Sample]) -> Sequence[float | NoReward]:
        return self.function(list(samples)) if self.batched else super().score(samples)


@REWARDS.register("environment")
class EnvironmentReward(Reward):
    """What the environment of an episode gave, for its place among other rewards with weights of their own."""

    has_environment = True

    def __init__(self, config: Reward.Config | None = None, name: str = "environment") -> None:
        self.name = name

    def score_one(self, sample: Sample) -> float | NoReward:
        if sample.environment_reward is None:
            raise RewardError(f"reward {self.name!r} is for samples of an environment; sample: {describe(sample)}")
        return sample.environment_reward


def describe(sample: Sample) -> str:
    """How error messages name a sample: prompt index, and the heads of both texts."""
    return f"prompt {sample.prompt.index} {_head(sample.prompt.text)}, response {_head(sample.response_text)}"


def _checked(name: str, samples: Sequence[Sample], values: Any) -> list[float | NoReward]:
    if isinstance(values, torch.Tensor | np.ndarray):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise RewardError(
            f"reward {name!r} returned {type(values).__name__} {_head(repr(values))} for {len(samples)} samples; "
            "expected one number for each"
        )
    if len(values) != len(samples):
        raise RewardError(f"reward {name!r} returned {len(values)} values for {len(samples)} samples")
    return [_as_float(name, sample, value) for sample, value in zip(samples, values, strict=True)]


def _as_float(name: str, sample: Sample, value: Any) -> float | NoReward:
    if isinstance(value, NoReward):
        return value
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real):
        raise RewardError(
            f"reward {name!r} returned {type(value).__name__} {_head(repr(value))}, expected one number; "
            f"sample: {describe(sample)}"
        )
    if not math.isfinite(value):
        raise RewardError(
            f"reward {name!r} returned {float(value)}, expected a finite number; sample: {describe(sample)}"
        )
    return float(value)


def _head(text: str) -> str:
    return repr(text if len(text) <= HEAD_CHARS else text[:HEAD_CHARS] + "…")
