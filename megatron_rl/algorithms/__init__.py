"""Algorithms as small classes over pure functions: importing this package registers all of them in `ALGORITHMS`."""

from megatron_rl.algorithms.base import ALGORITHMS, BaseAlgorithm
from megatron_rl.algorithms.cispo import CISPO, SAPO
from megatron_rl.algorithms.dapo import DAPO
from megatron_rl.algorithms.dpo import DPO
from megatron_rl.algorithms.grpo import GRPO, DrGRPO
from megatron_rl.algorithms.gspo import GMPO, GSPO
from megatron_rl.algorithms.kto import BCO, KTO
from megatron_rl.algorithms.offline import OfflineAlgorithm, PairwiseAlgorithm
from megatron_rl.algorithms.pairs import PAIR_LOSSES
from megatron_rl.algorithms.policy_gradient import PolicyGradient
from megatron_rl.algorithms.ppo import PPO
from megatron_rl.algorithms.reference_free import CPO, ORPO, SimPO
from megatron_rl.algorithms.reward_modelling import RewardModelling
from megatron_rl.algorithms.rloo import OPO, RLOO, ReinforcePP, ReinforcePPBaseline
from megatron_rl.algorithms.sft import SFT

__all__ = [
    "ALGORITHMS",
    "BCO",
    "CISPO",
    "CPO",
    "DAPO",
    "DPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "KTO",
    "OPO",
    "ORPO",
    "PAIR_LOSSES",
    "PPO",
    "RLOO",
    "SAPO",
    "SFT",
    "BaseAlgorithm",
    "DrGRPO",
    "OfflineAlgorithm",
    "PairwiseAlgorithm",
    "PolicyGradient",
    "ReinforcePP",
    "ReinforcePPBaseline",
    "RewardModelling",
    "SimPO",
]
