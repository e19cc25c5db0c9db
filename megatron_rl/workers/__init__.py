"""Actor, Critic, Reference and RewardModel: roles around Megatron-Core model chunks."""

from megatron_rl.workers.actor import Actor
from megatron_rl.workers.critic import Critic
from megatron_rl.workers.reference import Reference
from megatron_rl.workers.reward_model import RewardModel

__all__ = ["Actor", "Critic", "Reference", "RewardModel"]
