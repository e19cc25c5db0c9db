"""The sum of several equally long parts in fp32, in a fixed order."""

from megatron_rl.ops.accumulate.interface import accumulate

__all__ = ["accumulate"]
