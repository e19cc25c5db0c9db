"""The residual addition and the RMS norm that follows it, in one step."""

from megatron_rl.ops.add_rms_norm.interface import add_rms_norm

__all__ = ["add_rms_norm"]
