"""Attention inside prompts, all of one padded length."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_rl.ops.packed_attention import packed_attention, whole_sequences


def attend_prompts(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention inside each prompt; heads ``[prompts, length, heads, head_dim]``, fewer of keys than of queries
    where grouped. ``[prompts * length, q_heads * head_dim]``."""
    count, length = queries.shape[:2]
    if softcap is None and sinks is None and (window is None or window >= length):
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        grouped = q.shape[1] != k.shape[1]
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return context.transpose(1, 2).flatten(0, 1).flatten(1)
    return packed_attention(
        queries.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        whole_sequences(torch.arange(count + 1) * length),
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    ).flatten(1)
