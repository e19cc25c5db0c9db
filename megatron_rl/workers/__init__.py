"""Actor, Critic, Reference and RewardModel: roles around Megatron-Core model chunks."""
