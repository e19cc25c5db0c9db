"""Reinforcement learning for the Megatron-Core job you already run."""

__version__ = "0.1.0"
