"""`Environment`: what a model talks to for many turns; one instance an episode.

class Guess(Environment):
    def reset(self, prompt: Prompt) -> list[Message]:
        return [{"role": "user", "content": prompt.text}]

    def step(self, message: Message) -> Step:
        right = message["content"].strip() == self.secret
        return Step("right" if right else "wrong, try again", reward=float(right), done=right)

Both methods may be plain or `async`: plain ones run in a thread of their own, so they may block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_rl.batch import Prompt
from megatron_rl.config import ConfigRecord
from megatron_rl.data.messages import Message
from megatron_rl.environments.tools import Tool
from megatron_rl.registry import Registry


class EpisodeError(RuntimeError):
    """An environment that raised, hung or answered with something else; the message names the episode."""


class Step(NamedTuple):
    """What an environment answers to one message of the model."""

    messages: str | Mapping[str, Any] | Sequence[Message] = ()  # the observation; a string is a user's message
    reward: float = 0.0  # added to the episode's
    done: bool = False  # the episode ends here, and the observation is not shown


class Environment:
    """Subclasses override `step`, and `reset` where the prompt's own messages are not the beginning."""

    class Config(ConfigRecord):
        """Options, from YAML or keyword arguments."""

    name: str = "environment"
    tools: Sequence[Tool] = ()  # that the chat template tells the model of; its calls of them are parsed
    roles: tuple[str, ...] = ("user",)  # of an observation's messages: what the chat template is checked with
    drives = False  # it asks the model by itself, in `drive`; then neither `reset` nor `step` is called
    seed: int = 0  # set before `reset`; the same for the same sample of the same prompt in the same step

    def reset(self, prompt: Prompt) -> Any:
        """The messages of the beginning; a string is a user's message. By default those of the prompt."""
        return prompt.messages or prompt.text

    def step(self, message: Message) -> Any:
        """The `Step` that answers ``message``: ``role`` "assistant", ``content`` (without its calls of tools), and
        where there are calls ``tool_calls`` as OpenAI's API has them, ``arguments`` parsed; ``tool_call_errors`` says
        what was wrong with calls that could not be parsed."""
        raise NotImplementedError(f"{type(self).__name__} does not override step")

    async def drive(self, session: Any, prompt: Prompt) -> None:
        """Hold the whole conversation with the model: ``session`` is a `Session`."""
        raise NotImplementedError(f"{type(self).__name__} says that it drives, but does not override drive")

    def close(self) -> Any:
        """Called once, however the episode ended."""


ENVIRONMENTS: Registry[type[Environment]] = Registry("environment")


def as_observation(value: Any) -> list[Message]:
    """``value`` of a `Step` or of `Environment.reset` as messages.

    Raises:
        TypeError: it is neither a string, nor a message, nor a list of messages.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    messages: list[Any] = list(value) if isinstance(value, Sequence) else [None]
    if not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise TypeError(f"{value!r:.100} are no messages: expected a string, or messages with role and content")
    return [dict(message) for message in messages]


def as_step(value: Any) -> Step:
    """``value`` as a `Step`; a tuple of (observation, reward, done) will do.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, tuple) or len(value) != 3:
        raise TypeError(f"{value!r:.100} is no answer to a message: expected (observation, reward, done)")
    observation, reward, done = value
    return Step([] if done else as_observation(observation), float(reward), bool(done))
