"""Algorithms as small classes over pure functions: importing this package registers all of them in `ALGORITHMS`."""

from megatron_rl.algorithms.base import ALGORITHMS, BaseAlgorithm
from megatron_rl.algorithms.grpo import GRPO, DrGRPO
from megatron_rl.algorithms.policy_gradient import PolicyGradient

__all__ = ["ALGORITHMS", "GRPO", "BaseAlgorithm", "DrGRPO", "PolicyGradient"]
