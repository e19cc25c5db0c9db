"""Attention of one new token per sequence over a KV cache, with rotary positions and the cache write."""

from megatron_rl.ops.decode_attention.interface import decode_attention

__all__ = ["decode_attention"]
