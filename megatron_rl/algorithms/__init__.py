"""Algorithms as small classes over pure functions: importing this package registers all of them in `ALGORITHMS`."""

from megatron_rl.algorithms.base import ALGORITHMS, BaseAlgorithm
from megatron_rl.algorithms.cispo import CISPO, SAPO
from megatron_rl.algorithms.dapo import DAPO
from megatron_rl.algorithms.grpo import GRPO, DrGRPO
from megatron_rl.algorithms.gspo import GMPO, GSPO
from megatron_rl.algorithms.policy_gradient import PolicyGradient
from megatron_rl.algorithms.ppo import PPO
from megatron_rl.algorithms.rloo import RLOO, ReinforcePP, ReinforcePPBaseline

__all__ = [
    "ALGORITHMS",
    "CISPO",
    "DAPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "PPO",
    "RLOO",
    "SAPO",
    "BaseAlgorithm",
    "DrGRPO",
    "PolicyGradient",
    "ReinforcePP",
    "ReinforcePPBaseline",
]
