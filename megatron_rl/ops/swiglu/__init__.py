"""The gated activation between the two projections of a decoder's feed-forward layer, forward and backward."""

from megatron_rl.ops.swiglu.interface import swiglu

__all__ = ["swiglu"]
