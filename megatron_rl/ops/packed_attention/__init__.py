"""Causal attention over sequences of different lengths that lie end to end, forward and backward."""

from megatron_rl.ops.packed_attention.interface import packed_attention, whole_sequences

__all__ = ["packed_attention", "whole_sequences"]
