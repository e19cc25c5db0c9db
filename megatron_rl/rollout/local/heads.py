"""Query, key and value heads of tokens on one rank: `GroupedHeads` of one projection, or `LatentHeads` of latents.

Both give the heads that attention over the KV cache takes, and both say which part of the context is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_rl.models.components.attention import GroupedQueryAttention
from megatron_rl.models.components.mla import LatentAttention
from megatron_rl.models.components.norm import Norm
from megatron_rl.models.components.position import neighbours_to_halves
from megatron_rl.rollout.local.norm_weight import NormWeight

Named = Callable[[str], torch.Tensor]  # SGLang's name -> this rank's parameter


@dataclass(frozen=True, slots=True)
class GroupedHeads:
    """Grouped-query attention."""

    q_heads: int  # of this rank
    kv_heads: int
    head_dim: int
    qkv: torch.Tensor
    bias: torch.Tensor | None
    q_norm: NormWeight | None
    k_norm: NormWeight | None

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        """``[tokens, q_heads + 2 * kv_heads, head_dim]``, not yet turned."""
        qkv = F.linear(normed, self.qkv, self.bias).view(len(normed), -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = qkv[:, : self.q_heads], qkv[:, self.q_heads : self.q_heads + self.kv_heads]
            queries.copy_(self.q_norm(queries))
            keys.copy_(self.k_norm(keys))
        return qkv

    def context(self, context: torch.Tensor) -> torch.Tensor:
        """What the output projection reads of ``[tokens, q_heads * head_dim]``."""
        return context


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """Latent attention, written out: every head gets its key and its value, and the cache holds those."""

    described: LatentAttention
    heads: int  # of this rank
    down: torch.Tensor  # to the latents: that of queries, where they have one, above that of keys and values
    q: torch.Tensor  # to query heads, from their latent or from the hidden state
    q_norm: NormWeight | None
    kv_norm: NormWeight
    kv: torch.Tensor  # from a latent to key and value heads

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        """``[tokens, 3 * heads, cached_dim]``, not yet turned: the channels that turn come first."""
        mla, dim, heads = self.described.mla, self.described.cached_dim, self.heads
        source, latents = normed, F.linear(normed, self.down)
        if self.q_norm is not None:
            source, latents = latents.split([mla.q_rank, mla.kv_rank + mla.rope_dim], -1)
            source = self.q_norm(source)
        latent, turning = latents.split([mla.kv_rank, mla.rope_dim], -1)
        queries = F.linear(source, self.q).view(len(normed), heads, -1)
        both = F.linear(self.kv_norm(latent), self.kv).view(len(normed), heads, -1)
        found = normed.new_zeros(len(normed), 3 * heads, dim)
        resting = slice(mla.rope_dim, mla.rope_dim + mla.nope_dim)
        found[:, :heads, : mla.rope_dim] = self._halves(queries[..., mla.nope_dim :])
        found[:, :heads, resting] = queries[..., : mla.nope_dim]
        found[:, heads : 2 * heads, : mla.rope_dim] = self._halves(turning)[:, None]
        found[:, heads : 2 * heads, resting] = both[..., : mla.nope_dim]
        found[:, 2 * heads :, : mla.value_dim] = both[..., mla.nope_dim :]
        return found

    def context(self, context: torch.Tensor) -> torch.Tensor:
        """What the output projection reads of ``[tokens, heads * cached_dim]``."""
        return context.unflatten(-1, (self.heads, -1))[..., : self.described.mla.value_dim].flatten(-2)

    def _halves(self, x: torch.Tensor) -> torch.Tensor:
        return neighbours_to_halves(x) if self.described.mla.interleaved else x


def heads_of(
    attention: GroupedQueryAttention | LatentAttention, named: Named, prefix: str, q_heads: int, kv_heads: int
) -> GroupedHeads | LatentHeads:
    """The heads of a layer, ``q_heads`` and ``kv_heads`` of them on this rank; ``prefix`` precedes its names."""

    def norm(norm: Norm) -> NormWeight:
        return NormWeight.of(norm, named(prefix + norm.hf))

    at = prefix + "self_attn."
    if isinstance(attention, GroupedQueryAttention):
        bias = named(at + "qkv_proj.bias") if attention.qkv_bias else None
        norms = (None if one is None else norm(one) for one in (attention.q_norm, attention.k_norm))
        return GroupedHeads(q_heads, kv_heads, attention.head_dim, named(at + "qkv_proj.weight"), bias, *norms)
    q_norm, kv_norm = attention.latent_norms
    return LatentHeads(
        attention,
        q_heads,
        down=named(at + ("fused_qkv_a_proj_with_mqa" if q_norm else "kv_a_proj_with_mqa") + ".weight"),
        q=named(at + ("q_b_proj" if q_norm else "q_proj") + ".weight"),
        q_norm=None if q_norm is None else norm(q_norm),
        kv_norm=norm(kv_norm),
        kv=named(at + "kv_b_proj.weight"),
    )
