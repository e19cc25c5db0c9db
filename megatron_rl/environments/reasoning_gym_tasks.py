"""`ReasoningGymEnvironment`: the verifiable tasks of PyPI's `reasoning-gym` (https://github.com/open-thought/reasoning-gym).

Each row of the data names a task as its prompt, {"prompt": "chain_sum"}; the row's number is the entry's.

environment: {name: reasoning_gym, options: {seed: 42, tasks: {chain_sum: {min_terms: 2, max_terms: 3}}}}
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from pydantic import Field

from megatron_rl.batch import Prompt
from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.config.ranges import Seed
from megatron_rl.data.messages import Message
from megatron_rl.environments.environment import ENVIRONMENTS, Environment, Step

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@ENVIRONMENTS.register("reasoning_gym")
class ReasoningGymEnvironment(Environment):
    """One question, one answer, and the task's own score of it, from 0 to 1.

    Raises:
        ConfigError: reasoning-gym is not installed, or has no such task.
    """

    class Config(ConfigRecord):
        """Which entries."""

        seed: Seed = 0
        """Of the tasks' entries."""
        size: int = Field(default=1_000_000, ge=1)
        """Entries of a task; they are made when they are asked for."""
        tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)
        """Options of tasks by name, as `reasoning_gym.create_dataset` takes them."""
        instruction: str = "Write the final answer between <answer> and </answer>."
        """Stands below each question. An answer without these marks is scored as a whole."""

    name = "reasoning_gym"

    def __init__(self, options: Config | None = None) -> None:
        self.options = options or self.Config()
        for task in self.options.tasks:
            self._entries(task)

    def reset(self, prompt: Prompt) -> str:
        self._dataset = self._entries(_asked(prompt))
        self._entry = self._dataset[prompt.index % self.options.size]
        return f"{self._entry['question']}\n{self.options.instruction}"

    def step(self, message: Message) -> Step:
        marked = ANSWER.findall(message["content"])
        answer = (marked[-1] if marked else message["content"]).strip()
        return Step(reward=float(self._dataset.score_answer(answer, entry=self._entry)), done=True)

    def _entries(self, task: str) -> Any:
        options = self.options.tasks.get(task, {})
        return _dataset(task, self.options.seed, self.options.size, tuple(sorted(options.items())))


@cache
def _dataset(task: str, seed: int, size: int, options: tuple[tuple[str, Any], ...]) -> Any:
    """Entries are a function of seed and number: all episodes of a process share one."""
    try:
        import reasoning_gym  # an extra of its own
    except ImportError as error:
        raise ConfigError(f"environment reasoning_gym: pip install 'megatron-rl[reasoning-gym]' ({error})") from None
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **dict(options))
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"environment reasoning_gym: task {task!r} with {dict(options)}: {error}") from None


def _asked(prompt: Prompt) -> str:
    """The name of the task."""
    return str(prompt.messages[-1]["content"] if prompt.messages else prompt.text).strip()
