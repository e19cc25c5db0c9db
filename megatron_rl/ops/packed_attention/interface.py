"""The contract of `packed_attention` and its edge checks.

A *segment* is a run of queries that are the last positions of a run of keys: query i of n sees the first
``num_keys - n + i + 1`` keys. A whole sequence is one segment with as many queries as keys; a rank that holds chunks of
a sequence (context parallelism) has one segment for each. Segments may share keys, not queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.selection import choose

MAX_HEAD_DIM = 256  # of the "cpu" implementation: kMaxHeadDim of csrc/cpu/ops.h


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    *,
    scale: float,
    rotary: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str | None = None,
) -> Tensor:
    """``softmax(scale * query @ key.T) @ value`` of each segment and head; differentiable.

    Args:
        query: [queries, heads, dim], fp32, bf16 or fp16.
        key: [keys, groups, dim] with groups that divide heads: query head h reads group ``h // (heads / groups)``.
        value: [keys, groups, value_dim].
        segments: [segments, 4] int64 on the CPU: first query, number of queries, first key, number of keys. They cover
            all queries, in order.
        rotary: [2, positions, turned / 2] fp32: cosines and sines by which the first ``turned`` channels of queries
            and keys are rotated, for at least as many positions as a segment has keys; a segment's first key stands at
            position 0. None: they are used as they are.
        window: keys that a query sees at most, its own included; None = all before it.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2); None = they stay as they are.
        sinks: [heads], a score beside those of each query's keys that has no value, so that weights sum to less than
            1 (gpt-oss, after Xiao et al. 2023, arXiv:2309.17453); it has a gradient. None = none.
        dropout: probability with which a softmax weight is dropped; only "reference" can.
        implementation: forces one; None takes the best available: "cpu" for fp32 without dropout, else
            "reference".

    Returns:
        [queries, heads, value_dim].

    Raises:
        ValueError: shapes or segments that do not fit.
        UnavailableError: the forced implementation cannot run here.
    """
    _check(query, key, value, segments)
    _check_rotary(query, segments, rotary)
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a query sees at least its own key")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap={softcap}: expected a positive number, or None for none")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks {list(sinks.shape)}: expected one for each of the {query.shape[1]} heads")
    if window is not None and window >= int(segments[:, 3].max()):
        window = None
    if implementation is None and (
        query.dtype != torch.float32 or dropout > 0.0 or max(query.shape[2], value.shape[2]) > MAX_HEAD_DIM
    ):
        implementation = "reference"
    run = choose("packed_attention", query.device.type, implementation)
    out: Tensor = run(query, key, value, segments, rotary, scale, dropout, window, softcap, sinks)
    return out


def whole_sequences(cu_seqlens: Tensor) -> Tensor:
    """The segments of sequences whose queries and keys all lie here, ``[sequences, 4]``.

    Args:
        cu_seqlens: ``[sequences + 1]``, where each begins and the last ends; on any device.
    """
    edges = cu_seqlens.cpu().long()
    first, count = edges[:-1], edges.diff()
    return torch.stack([first, count, first, count], dim=1)


def _check(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 3 or key.shape[:2] != value.shape[:2]:
        raise ValueError(f"{shapes}: expected [queries, heads, dim], [keys, groups, dim], [keys, groups, value_dim]")
    if query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(f"{shapes}: the head dimensions must be equal and the groups must divide the heads")
    if segments.shape[1:] != (4,) or segments.dtype != torch.int64 or segments.device.type != "cpu":
        raise ValueError(f"segments {list(segments.shape)} {segments.dtype}: expected [segments, 4] int64 on the CPU")
    first_query, num_queries, first_key, num_keys = segments.unbind(1)
    covered = torch.cat([first_query, first_query.new_tensor([query.shape[0]])])
    last_key = first_key + num_keys
    if covered[0] != 0 or not torch.equal(covered.diff(), num_queries):
        raise ValueError(f"segments {segments.tolist()} do not cover the {query.shape[0]} queries in order")
    if bool(((num_queries > num_keys) | (first_key < 0) | (last_key > key.shape[0])).any()):
        raise ValueError(f"segments {segments.tolist()} do not fit {key.shape[0]} keys")


def _check_rotary(query: Tensor, segments: Tensor, rotary: Tensor | None) -> None:
    if rotary is None:
        return
    longest, half = int(segments[:, 3].max()), query.shape[2] // 2
    if rotary.dim() != 3 or len(rotary) != 2 or not 0 < rotary.shape[2] <= half or rotary.shape[1] < longest:
        raise ValueError(
            f"rotary {list(rotary.shape)}: expected [2, {longest} or more, 1 to {half}] for query {list(query.shape)}"
        )
