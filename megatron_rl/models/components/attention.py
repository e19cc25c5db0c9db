"""`GroupedQueryAttention`: causal self-attention whose query heads share key and value heads in groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.models.components.norm import Norm
from megatron_rl.models.components.position import Rotary
from megatron_rl.models.latent_projections import HeadRows
from megatron_rl.models.parameters import FusedQKV, InputColumns, Parameter, Replicated, Rows


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """Query, key and value projections, rotary positions, softmax over the keys before, output projection."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: Rotary
    qkv_bias: bool = False
    q_norm: Norm | None = None  # over each query head; always together with k_norm
    k_norm: Norm | None = None
    window: int | None = None  # keys that a query sees, its own included; None = all before it
    o_bias: bool = False
    scale: float | None = None  # of products of queries and keys; None = head_dim ** -0.5
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: bool = False  # each head has a score beside those of its keys that has no value
    fused_in_file: bool = False  # the Hugging Face file has one qkv_proj, queries above keys above values

    # Megatron's norm before it, where fused into the projection
    fused_norm: ClassVar[str] = "self_attention.linear_qkv.layer_norm_weight"

    @property
    def cached_dim(self) -> int:
        """Channels that a key or a value takes in a cache of both."""
        return self.head_dim

    def parameters(self) -> Iterator[Parameter]:
        """Names lack the layer's prefix."""
        for suffix in ("weight", "bias") if self.qkv_bias else ("weight",):
            yield FusedQKV(
                *self._rows(suffix),
                head_dim=self.head_dim,
                cols=self.hidden if suffix == "weight" else None,
                megatron_name=f"self_attention.linear_qkv.{suffix}",
                rollout_name=f"self_attn.qkv_proj.{suffix}",
            )
        if self.q_norm is not None and self.k_norm is not None:
            yield self.q_norm.parameter("self_attention.q_layernorm.weight")
            yield self.k_norm.parameter("self_attention.k_layernorm.weight")
        inputs = self.num_heads * self.head_dim
        yield InputColumns("self_attn.o_proj.weight", self.hidden, inputs, "self_attention.linear_proj.weight")
        if self.o_bias:
            yield Replicated("self_attn.o_proj.bias", (self.hidden,), "self_attention.linear_proj.bias")
        if self.sinks:
            yield HeadRows("self_attn.sinks", self.num_heads, None, "self_attention.core_attention.softmax_offset")

    def _rows(self, suffix: str) -> tuple[Rows, Rows, Rows]:
        """Where queries, keys and values lie in the Hugging Face file."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.fused_in_file:
            qkv = f"self_attn.qkv_proj.{suffix}"
            return Rows(qkv, 0, queries), Rows(qkv, queries, keys), Rows(qkv, queries + keys, keys)
        q, k, v = (f"self_attn.{letter}_proj.{suffix}" for letter in "qkv")
        return Rows(q, 0, queries), Rows(k, 0, keys), Rows(v, 0, keys)
