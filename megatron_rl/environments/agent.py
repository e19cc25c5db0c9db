"""`AgentEnvironment`: an agent that is written elsewhere, trained as it is.

def agent(base_url: str, api_key: str, prompt: Prompt) -> float:  # plain or async
    client = openai.OpenAI(base_url=base_url, api_key=api_key)
    answer = client.chat.completions.create(model="policy", messages=[{"role": "user", "content": prompt.text}])
    return float("42" in answer.choices[0].message.content)  # the episode's reward

actor.sample(environment=lambda: AgentEnvironment(agent))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_rl.batch import Prompt
from megatron_rl.config import ConfigError, ConfigRecord, load_user_object
from megatron_rl.environments.agent_session import AgentSession
from megatron_rl.environments.calling import call
from megatron_rl.environments.endpoint import shared_endpoint
from megatron_rl.environments.environment import ENVIRONMENTS, Environment, EpisodeError
from megatron_rl.environments.session import Session


@ENVIRONMENTS.register("agent")
class AgentEnvironment(Environment):
    """A function that runs an agent against an `Endpoint` and returns a reward.

    Args:
        options: an `AgentEnvironment.Config`; or the function itself. A plain one runs in a thread; it may start a
            program.
    """

    class Config(ConfigRecord):
        """Which agent."""

        function: str
        """python:package.module:function or python:path/to/file.py:function of (base_url, api_key, prompt)."""
        host: str = "127.0.0.1"
        """Address of this machine that the agent reaches; the port is chosen."""

    name = "agent"
    roles = ("tool",)
    drives = True

    def __init__(self, options: Config | Callable[[str, str, Prompt], Any]) -> None:
        if isinstance(options, self.Config):
            self.function, self.host = load_user_object(options.function), options.host
        else:
            self.function, self.host = options, "127.0.0.1"
        if not callable(self.function):
            raise ConfigError(f"agent {self.function!r:.80} is none: expected a function of base_url, api_key, prompt")

    async def drive(self, session: Session, prompt: Prompt) -> None:
        """Run the agent to its end. Errors after a limit has ended the episode are the agent's way to stop.

        Raises:
            EpisodeError: the agent raised, asked for nothing, or gave no number.
        """
        config = session.config
        seconds = config.seconds or config.step_seconds * (config.max_turns + 1)
        endpoint = shared_endpoint(self.host)
        conversation = AgentSession(session)
        url, key = endpoint.open(conversation)
        reward: Any = 0.0
        try:
            reward = await call(self.function, url, key, prompt, seconds=seconds)
        except TimeoutError:
            raise EpisodeError(f"the agent did not end in {seconds:g} s") from None
        except Exception as error:
            if not session.ended:
                raise EpisodeError(f"the agent raised {type(error).__name__}: {error}") from error
        finally:
            endpoint.forget(key)
            conversation.end()
        if not session.begun or not session.transcript.turns:
            raise EpisodeError("the agent ended without asking the model for anything")
        try:
            session.transcript.reward = float(reward)
        except (TypeError, ValueError):
            raise EpisodeError(f"the agent returned {reward!r:.80}, expected its reward, a number") from None
