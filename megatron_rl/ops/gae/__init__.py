"""Generalised advantage estimation over packed, ragged, multi-turn responses."""

from megatron_rl.ops.gae.interface import gae

__all__ = ["gae"]
