"""Environments: what a model talks to for many turns, and the tokens of such an episode."""

from megatron_rl.environments.agent import AgentEnvironment
from megatron_rl.environments.chat import Chat
from megatron_rl.environments.environment import ENVIRONMENTS, Environment, EpisodeError, Step
from megatron_rl.environments.environment_config import (
    EnvironmentConfig,
    EnvironmentFactory,
    build_environment,
    first_of,
)
from megatron_rl.environments.episode import Lost, Player
from megatron_rl.environments.reasoning_gym_tasks import ReasoningGymEnvironment
from megatron_rl.environments.session import Model, Session
from megatron_rl.environments.tool_environment import ToolEnvironment
from megatron_rl.environments.tools import Tool
from megatron_rl.environments.transcript import Transcript
from megatron_rl.environments.verifiers_tasks import VerifiersEnvironment

__all__ = [
    "ENVIRONMENTS",
    "AgentEnvironment",
    "Chat",
    "Environment",
    "EnvironmentConfig",
    "EnvironmentFactory",
    "EpisodeError",
    "Lost",
    "Model",
    "Player",
    "ReasoningGymEnvironment",
    "Session",
    "Step",
    "Tool",
    "ToolEnvironment",
    "Transcript",
    "VerifiersEnvironment",
    "build_environment",
    "first_of",
]
