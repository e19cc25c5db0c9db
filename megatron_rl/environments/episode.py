"""`play`: one episode from `reset` to its end; what goes wrong in the environment is one `EpisodeError`, named."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_rl.batch import Prompt
from megatron_rl.environments.calling import call
from megatron_rl.environments.environment import Environment, EpisodeError, as_observation, as_step
from megatron_rl.environments.environment_config import EnvironmentConfig, EnvironmentFactory
from megatron_rl.environments.session import Ask, Model, Session
from megatron_rl.environments.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Lost:
    """In place of a transcript: this episode failed, and failures are to be dropped."""

    reason: str


@dataclass(frozen=True, slots=True)
class Player:
    """Plays the episodes of one call; of one event loop.

    Args:
        slots: environments that may work at once.
    """

    factory: EnvironmentFactory
    config: EnvironmentConfig
    model: Model
    slots: asyncio.Semaphore

    async def play(
        self, prompt: Prompt, sample: int, seed: int, turn_seed: Callable[[int], int], ask: Ask
    ) -> Transcript | Lost:
        """One episode, begun anew as often as configured.

        Args:
            seed: the environment's.
            turn_seed: the engine's, by the number of the turn.

        Raises:
            EpisodeError: the environment failed, and failures stop the run.
        """
        for attempt in range(self.config.retries + 1):
            session = Session(self.model, self.config, ask, turn_seed)
            try:
                return await self._play_once(session, prompt, seed)
            except EpisodeError as error:
                turn = session.transcript.turns if session.begun else 0
                reason = f"prompt {prompt.index}, sample {sample}, turn {turn}: {error}"
            if attempt == self.config.retries and self.config.on_failure == "stop":
                raise EpisodeError(f"{reason}; environment.on_failure=drop would go on without this sample")
        return Lost(reason)

    async def _play_once(self, session: Session, prompt: Prompt, seed: int) -> Transcript:
        environment = await self._work("a new one", self.factory)
        try:
            environment.seed = seed
            await self._talk(environment, session, prompt)
        finally:
            await self._work("close", environment.close)
        return session.transcript

    async def _talk(self, environment: Environment, session: Session, prompt: Prompt) -> None:
        if environment.drives:
            await environment.drive(session, prompt)
            return
        beginning = await self._work("reset", environment.reset, prompt, read=as_observation)
        session.begin(beginning, [tool.schema for tool in environment.tools])
        while True:
            message = await session.reply()
            if session.ended:  # in the middle of the message
                return
            step = await self._work("step", environment.step, message, read=as_step)
            session.transcript.reward += step.reward
            if step.done or not session.observe(list(step.messages)):
                return

    async def _work(self, what: str, function: Callable[..., Any], *arguments: Any, read: Any = None) -> Any:
        """One call of the environment.

        Raises:
            EpisodeError: it raised, hung or gave something else than expected.
        """
        name, seconds = self.config.name, self.config.step_seconds
        async with self.slots:
            try:
                found = await call(function, *arguments, seconds=seconds)
                return found if read is None else read(found)
            except TimeoutError as error:
                ending = f": {error}" if str(error) else f" after {seconds:g} s without an answer (step_seconds)"
                raise EpisodeError(f"environment {name!r}, {what}: given up{ending}") from None
            except EpisodeError:
                raise
            except Exception as error:
                raise EpisodeError(f"environment {name!r}, {what}: {type(error).__name__}: {error}") from error
