"""Rewards: samples in, one number each out; a mistake names the sample it concerns."""

from megatron_rl.rewards.answers import final_answer, ground_truth, last_number
from megatron_rl.rewards.build import RewardConfig, as_reward, build_reward
from megatron_rl.rewards.matching import ExactReward, NumberReward, RegexReward
from megatron_rl.rewards.mathematics import MathReward
from megatron_rl.rewards.reward import REWARDS, FunctionReward, Reward, RewardError
from megatron_rl.rewards.weighted import WeightedReward

__all__ = [
    "REWARDS",
    "ExactReward",
    "FunctionReward",
    "MathReward",
    "NumberReward",
    "RegexReward",
    "Reward",
    "RewardConfig",
    "RewardError",
    "WeightedReward",
    "as_reward",
    "build_reward",
    "final_answer",
    "ground_truth",
    "last_number",
]
