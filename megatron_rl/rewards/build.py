"""From what users write to a `Reward`: Python objects (`as_reward`) and configuration (`build_reward`).

rewards:
  - {name: math}
  - {name: regex, weight: 0.1, options: {pattern: "(?s)<think>.*</think>"}, label: format}
  - {name: "python:my_rewards.py:brevity", weight: 0.05}
  - {name: vllm, options: {url: "http://rewards:8000", model: my-reward-model}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.config import USER_CODE, ConfigError, ConfigRecord, load_user_object
from megatron_rl.config.ranges import Finite
from megatron_rl.rewards.reward import REWARDS, FunctionReward, Reward
from megatron_rl.rewards.service import SERVICES
from megatron_rl.rewards.weighted import WeightedReward


class RewardConfig(ConfigRecord):
    """One reward of a run's ``rewards`` list."""

    name: str
    """exact, number, regex, math, model, environment; a service: vllm, sglang, tei, tgi, http, judge; or
    python:package.module:function or python:path/to/file.py:function."""
    weight: Finite = 1.0
    """Factor in the sum over rewards."""
    label: str = ""
    """Name in logs; empty means the reward's own."""
    options: dict[str, Any] = {}  # noqa: RUF012  (pydantic copies defaults)
    """Options of that reward; for user functions {batched: true} passes the whole list of samples."""


def build_reward(configs: Sequence[RewardConfig]) -> Reward:
    """The reward that a configuration describes; several become their weighted sum.

    Raises:
        ConfigError: no reward, an unknown one, a bad option, absent user code, or two with one label.
    """
    if not configs:
        raise ConfigError(f"rewards is empty: name at least one of {', '.join(REWARDS)} or {USER_CODE}file.py:function")
    parts: dict[str, tuple[Reward, float]] = {}
    for config in configs:
        reward = _build_one(config)
        if reward.name in parts:
            raise ConfigError(f"two rewards are called {reward.name!r}: give one of them another label")
        parts[reward.name] = (reward, config.weight)
    (first, weight), *more = parts.values()
    return first if not more and weight == 1.0 else WeightedReward(parts)


def as_reward(source: Any, name: str | None = None, batched: bool = False) -> Reward:
    """A `Reward` from a `Reward`, a function, a registered or "python:" name, or a mapping of labels to any of these or
    to pairs (reward, weight).

    Args:
        name: label in logs; by default the reward's or function's own.
        batched: the function takes a list of samples and returns as many numbers.

    Raises:
        ConfigError: ``source`` is none of these.
    """
    if isinstance(source, Reward):
        source.name = name or source.name
        return source
    if isinstance(source, str):
        return _build_one(RewardConfig(name=source, label=name or "", options={"batched": True} if batched else {}))
    if isinstance(source, Mapping):
        pairs = {label: part if isinstance(part, tuple) else (part, 1.0) for label, part in source.items()}
        return WeightedReward({label: (as_reward(part, label), weight) for label, (part, weight) in pairs.items()})
    if callable(source):
        return FunctionReward(source, name, batched)
    raise ConfigError(
        f"{source!r} is not a reward: expected a function of one Sample, a Reward, one of {', '.join(REWARDS)}, "
        f"'{USER_CODE}file.py:function', or a mapping of names to these"
    )


def build_service(url: str, kind: str | None, name: str | None = None, **options: Any) -> Reward:
    """The reward that a server at ``url`` gives; ``options`` are fields of that kind's Config.

    Raises:
        ConfigError: there is no such kind, or the options do not fit it.
    """
    if kind not in SERVICES:
        given = "no kind was given" if kind is None else f"kind={kind!r} is none of them"
        raise ConfigError(f"a reward service at {url} needs kind, one of {', '.join(SERVICES)}: {given}")
    return _build_one(RewardConfig(name=kind, label=name or "", options={"url": url, **options}))


def _build_one(config: RewardConfig) -> Reward:
    if config.name.startswith(USER_CODE):
        return _from_user_code(config)
    try:
        kind = REWARDS[config.name]
    except ValueError as error:
        raise ConfigError(f"{error}, or {USER_CODE}file.py:function") from None
    options = kind.Config.parse(config.options, where=f"options of reward {config.name!r}")
    return kind(options, name=config.label or config.name)  # type: ignore[call-arg]  # registered rewards take these two


def _from_user_code(config: RewardConfig) -> Reward:
    found = load_user_object(config.name)
    if isinstance(found, type) and issubclass(found, Reward):
        reward = found(**config.options)
        reward.name = config.label or reward.name
        return reward
    unknown = sorted(set(config.options) - {"batched"})
    if unknown:
        raise ConfigError(f"reward {config.name!r}: a function has only the option batched, not {unknown[0]!r}")
    return as_reward(found, config.label or None, bool(config.options.get("batched", False)))
