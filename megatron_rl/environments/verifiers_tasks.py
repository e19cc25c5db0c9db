"""`VerifiersEnvironment`: environments of PyPI's `verifiers` (https://github.com/PrimeIntellect-ai/verifiers).

Each row of the data stands for a task: the row's number is that of the task in the environment's taskset; what the row
says is not read. ``env`` is the block that `verifiers` itself reads.

environment: {name: verifiers, options: {env: {taskset: {id: my_tasks},
  agent: {harness: {id: "null"}, runtime: {type: subprocess}}}}}
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import json
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import Field

from megatron_rl.batch import Prompt
from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.environments.agent import AgentEnvironment
from megatron_rl.environments.endpoint import shared_endpoint
from megatron_rl.environments.environment import ENVIRONMENTS, EpisodeError

START_SECONDS, STOP_SECONDS = 60.0, 10.0
NO_KEY = "MEGATRON_RL_NO_API_KEY"  # a variable that is not set: sessions are found by their number


@ENVIRONMENTS.register("verifiers")
class VerifiersEnvironment(AgentEnvironment):
    """One task, played by the harness that the environment names; the reward is that of its trace.

    The harness talks to the model through `Endpoint`, so it must speak the chat completions of OpenAI's API, in one
    conversation that only grows.

    Raises:
        ConfigError: verifiers is not installed, has no such environment, or more than one of its agents is the model.
    """

    class Config(ConfigRecord):
        """Which environment."""

        env: dict[str, Any]
        """The environment as `verifiers` describes it: ``taskset``, ``id``, ``agent`` and so on."""
        size: int | None = Field(default=None, ge=1)
        """Tasks that are used, the first ones; None = all. A taskset without end needs a number."""
        host: str = "127.0.0.1"
        """Address of this machine under which harnesses find the model; the port is chosen."""

    name = "verifiers"

    def __init__(self, options: Config) -> None:
        super().__init__(self._play)
        self.host = options.host
        self._served = _serve(json.dumps(options.env, sort_keys=True), options.size)

    async def _play(self, base_url: str, api_key: str, prompt: Prompt) -> float:
        """Raises:
        EpisodeError: the episode failed; a limit of this run makes it fail, too.
        """
        endpoint = shared_endpoint(self.host)
        return await self._served.play(
            prompt.index, f"{endpoint.url}/v1", lambda trace: endpoint.add_name(api_key, trace.id)
        )


class ServedEnvironment:
    """An environment of `verifiers` and what serves it, on an event loop in a thread of its own until the process ends.

    Args:
        env: of the class `verifiers.v1.Env`.
    """

    def __init__(self, env: Any, tasks: list[Any]) -> None:
        self.env, self.tasks = env, tasks
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="verifiers", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_SECONDS) or self._failure is not None:
            raise ConfigError(f"environment verifiers: could not be served in {START_SECONDS:g} s: {self._failure}")
        atexit.register(self._close)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:
            self._failure = error
            self._ready.set()

    async def _serve(self) -> None:
        async with self.env.serving():
            self._ready.set()
            await self._stop.wait()

    def _close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_SECONDS)

    async def play(self, number: int, url: str, on_trace: Callable[[Any], None]) -> float:
        """The reward of one episode, from any event loop; given up where the caller is.

        Args:
            url: of the model. Requests name their trace in the header X-Session-ID.
            on_trace: called with a trace before its first request.

        Raises:
            EpisodeError: what the environment says went wrong.
        """
        from verifiers.v1 import EvalClientConfig, ModelContext

        client = EvalClientConfig(base_url=url, api_key_var=NO_KEY)
        playing = self.env.run_episode(
            self.tasks[number % len(self.tasks)], ModelContext(model="policy", client=client), on_trace=on_trace
        )
        episode = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(playing, self._loop))
        if not episode.ok:
            errors = [episode.last_error, *(trace.last_error for trace in episode.traces)]
            said = next((f"{error.type}: {error.message}" for error in errors if error is not None), "no reason given")
            raise EpisodeError(f"verifiers: {said}")
        return float(sum(trace.reward for trace in episode.traces if trace.agent.trainable))


@cache
def _serve(env: str, size: int | None) -> ServedEnvironment:
    """All episodes of a process share one."""
    try:
        from verifiers.v1.configs.agent import agent_config_fields  # an extra of its own
        from verifiers.v1.utils.loaders import load_environment, resolve_env_config
    except ImportError as error:
        raise ConfigError(f"environment verifiers: pip install 'megatron-rl[verifiers]' ({error})") from None
    try:
        config = resolve_env_config(json.loads(env))
        loaded = load_environment(config)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise ConfigError(f"environment verifiers: {env}: {error}") from None
    models = [name for name, agent in agent_config_fields(config).items() if agent.client is None]
    if len(models) != 1:
        raise ConfigError(
            f"environment verifiers: {env}: {len(models)} agents are the model in training ({', '.join(models)}), "
            "but an episode is one conversation: give each other agent a `client` of its own"
        )
    if size is None and not loaded.taskset.bounded:
        raise ConfigError(f"environment verifiers: {env}: the taskset has no end: set options.size")
    tasks = list(itertools.islice(loaded.taskset, size))
    if not tasks:
        raise ConfigError(f"environment verifiers: {env}: the taskset is empty")
    return ServedEnvironment(loaded, tasks)
