"""`packed_attention` by torch's own attention, one segment at a time, on any device and dtype; autograd differentiates
it. The cost is the sum over segments; a mask exists only where a segment has more keys than queries, or than the
window."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    rotary: Tensor | None,
    scale: float,
    dropout: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `megatron_rl.ops.packed_attention.interface.packed_attention`."""
    value_dim = value.shape[-1]
    if value_dim < query.shape[-1]:  # the memory-efficient kernels want one head dimension
        value = F.pad(value, (0, query.shape[-1] - value_dim))
    outs = []
    for first_query, num_queries, first_key, num_keys in segments.tolist():
        queries = query[first_query : first_query + num_queries]
        keys, values = (x[first_key : first_key + num_keys] for x in (key, value))
        if rotary is not None:
            keys = rotate(keys, rotary[:, :num_keys])
            queries = rotate(queries, rotary[:, num_keys - num_queries : num_keys])
        if softcap is None and sinks is None:
            outs.append(_attend(queries, keys, values, scale, dropout, window))
        else:
            outs.append(_attend_written_out(queries, keys, values, scale, dropout, window, softcap, sinks))
    return torch.cat(outs)[..., :value_dim]


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the first channels of ``x`` ``[positions, heads, dim]``, in its dtype, by ``rotary`` ``[2, positions,
    turned / 2]``: channel i with i + turned / 2 (Su et al. 2021, arXiv:2104.09864, in the half-split form of Hugging
    Face)."""
    turned = 2 * rotary.shape[2]
    if turned < x.shape[-1]:
        return torch.cat([rotate(x[..., :turned], rotary), x[..., turned:]], dim=-1)
    cos, sin = rotary.to(x.dtype)[:, :, None].repeat(1, 1, 1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, window: int | None) -> Tensor:
    mask = None
    if query.shape[0] != key.shape[0] or (window is not None and window < key.shape[0]):
        mask = _suffix_mask(query.shape[0], key.shape[0], window or key.shape[0], query.dtype, query.device)
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out[0].transpose(0, 1)


def _attend_written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What torch's own attention cannot; scores in fp32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    queries = query.unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("qghd,kgd->ghqk", queries, key).to(wide) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + _suffix_mask(len(query), len(key), window or len(key), wide, query.device)
    if sinks is not None:
        column = sinks.to(wide).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = F.dropout(scores.softmax(-1)[..., : len(key)], dropout).to(value.dtype)
    return torch.einsum("ghqk,kgd->qghd", weights, value).flatten(1, 2)


@lru_cache(maxsize=16)
def _suffix_mask(num_queries: int, num_keys: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive causal mask for the last ``num_queries`` of ``num_keys`` positions, each of which sees ``window`` keys,
    its own included; one tensor for all layers."""
    before = num_keys - num_queries
    with torch.inference_mode(False):  # a cached inference tensor could not be saved for a later backward
        every = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        hidden = every.triu(before + 1) | every.tril(before - window)
        return torch.zeros(num_queries, num_keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
