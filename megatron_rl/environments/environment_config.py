"""From the section ``environment`` to environments: the limits of episodes, and `build_environment`.

environment: {name: tools, options: {tools: ["python:tools.py:calculate"]}, max_turns: 4}
environment: {name: "python:my_environment.py:Guess", options: {secrets: 10}, seconds: 120}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from megatron_rl.config import USER_CODE, ConfigError, ConfigRecord, load_user_object
from megatron_rl.config.ranges import Finite
from megatron_rl.environments.environment import ENVIRONMENTS, Environment
from megatron_rl.environments.tool_calls import ToolFormat

EnvironmentFactory = Callable[[], Environment]


class EnvironmentConfig(ConfigRecord):
    """What the model talks to, and the limits of an episode."""

    name: str
    """A registered environment, or python:package.module:Class or python:path/to/file.py:Class."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of that environment."""
    weight: Finite = 1.0
    """Factor of its rewards, which are added to those of `rewards`."""
    max_turns: int = Field(default=8, ge=1)
    """Most answers of the model in one episode; then its finish reason is "turns"."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens after the prompt, observations included; then the finish reason is "length". None = the model's
    context. `sampling.max_tokens` bounds each turn."""
    seconds: float | None = Field(default=None, gt=0)
    """Seconds after which no further turn begins; then the finish reason is "seconds"."""
    step_seconds: float = Field(default=60.0, gt=0)
    """Seconds that the environment may take for one answer; longer counts as a failure."""
    retries: int = Field(default=0, ge=0)
    """How often an episode whose environment failed is begun anew."""
    on_failure: Literal["stop", "drop"] = "stop"
    """When an environment raised or hung: stop the run, or drop this sample and count it."""
    concurrency: int = Field(default=64, ge=1)
    """Environments of one rollout replica that work at once; further ones wait. Agents are not counted: those of all
    episodes run at once."""
    tool_format: ToolFormat | Literal["auto"] = "auto"
    """How the model writes calls of tools; auto = as its chat template shows."""
    template: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, for example {enable_thinking: false}."""
    rewritten_history: Literal["stop", "keep"] = "stop"
    """Where the chat template would write earlier turns otherwise later on (without their thinking, for example): an
    error, or go on with the tokens as they were generated."""


def build_environment(config: EnvironmentConfig) -> EnvironmentFactory:
    """Makes one environment for each episode; one is made here, so that mistakes show.

    Raises:
        ConfigError: an unknown name, a bad option, or user code that is no Environment.
    """
    made = _user_factory(config) if config.name.startswith(USER_CODE) else _registered(config)
    first_of(made, config)
    return made


def first_of(made: EnvironmentFactory, config: EnvironmentConfig) -> Environment:
    """What ``made`` makes.

    Raises:
        ConfigError: it cannot be made, or is no `Environment`.
    """
    try:
        first: Any = made()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"environment {config.name!r} with options {config.options}: {error}") from None
    if not isinstance(first, Environment):
        raise ConfigError(f"environment {config.name!r} gives {first!r:.80}, expected an Environment")
    return first


def _registered(config: EnvironmentConfig) -> EnvironmentFactory:
    try:
        kind = ENVIRONMENTS[config.name]
    except ValueError as error:
        raise ConfigError(f"{error}, or {USER_CODE}file.py:Class") from None
    options = kind.Config.parse(config.options, where=f"options of environment {config.name!r}")
    return lambda: kind(options)  # type: ignore[call-arg]  # registered environments take it


def _user_factory(config: EnvironmentConfig) -> EnvironmentFactory:
    found = load_user_object(config.name)
    if not callable(found):
        raise ConfigError(f"environment {config.name!r} is {found!r:.80}, expected a subclass of Environment")
    return lambda: found(**config.options)
