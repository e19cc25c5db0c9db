"""Rewards: samples in, one number each out; a mistake names the sample it concerns."""

from megatron_rl.rewards.answers import final_answer, last_number
from megatron_rl.rewards.build import RewardConfig, as_reward, build_reward, build_service
from megatron_rl.rewards.matching import ExactReward, NumberReward, RegexReward
from megatron_rl.rewards.mathematics import MathReward
from megatron_rl.rewards.reward import REWARDS, EnvironmentReward, FunctionReward, NoReward, Reward, RewardError
from megatron_rl.rewards.service import SERVICES, ServiceReward
from megatron_rl.rewards.shared import SharedReward, share
from megatron_rl.rewards.truth import check_answers, ground_truth
from megatron_rl.rewards.weighted import WeightedReward

__all__ = [
    "REWARDS",
    "SERVICES",
    "EnvironmentReward",
    "ExactReward",
    "FunctionReward",
    "MathReward",
    "NoReward",
    "NumberReward",
    "RegexReward",
    "Reward",
    "RewardConfig",
    "RewardError",
    "ServiceReward",
    "SharedReward",
    "WeightedReward",
    "as_reward",
    "build_reward",
    "build_service",
    "check_answers",
    "final_answer",
    "ground_truth",
    "last_number",
    "share",
]
