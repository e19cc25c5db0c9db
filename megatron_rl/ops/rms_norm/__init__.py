"""RMS norm over the last dimension, forward and backward."""

from megatron_rl.ops.rms_norm.interface import rms_norm

__all__ = ["rms_norm"]
