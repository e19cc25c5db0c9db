"""Float8 weights with one scale per 128 x 128 block, for FP8 rollouts."""

from megatron_rl.ops.block_quantize.interface import BLOCK, block_quantize

__all__ = ["BLOCK", "block_quantize"]
