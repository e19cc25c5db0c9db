"""Carrying weights between layouts: a layout is data, a plan is the intersection of two layouts."""

from megatron_rl.reshard.layout import Layout, Shard, Span, block, stack_rows

__all__ = ["Layout", "Shard", "Span", "block", "stack_rows"]
