"""Causal core attention for the local layer spec: padded or packed, grouped queries, context parallel, any device.

Takes the place of `DotProductAttention` (which knows neither packing nor context parallelism) and follows
TransformerEngine's conventions. Everything is one case, `ops.packed_attention` over sequences laid end to end.
Context parallelism splits each sequence into ``2 * cp`` chunks and gives rank r chunks r and ``2 * cp - 1 - r``
("zig-zag"); keys and values are gathered and put into natural order, and each chunk attends to the keys up to its end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_rl.engines.megatron.model.rope import CosSinTable
from megatron_rl.ops.packed_attention import packed_attention
from megatron_rl.ops.packed_attention.reference import rotate


class CoreAttention(MegatronModule):
    """Softmax attention without parameters, over the heads of this tensor-parallel rank.

    Raises:
        ValueError: for anything but causal self-attention with a plain softmax over the prefix, or a window of it.
    """

    supports_packing = True
    softcap: float | None = None
    rotary: CosSinTable | None = None  # None: queries and keys arrive turned, as from Megatron's own layers

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,  # latent attention says its head sizes; tensors have them, too
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        _refuse_other_kinds(config, attn_mask_type, attention_type)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.layer_number = layer_number
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if config.window_size and windowed else None  # its own key included
        self.softmax_offset: torch.nn.Parameter | None = None  # Megatron's name for attention sinks
        if config.softmax_type == "learnable":
            self._add_sinks(groups.tp)
        self.cp_group = groups.cp if config.context_parallel_size > 1 else None

    def _add_sinks(self, tp_group: dist.ProcessGroup) -> None:
        """One number for each query head of this rank."""
        heads = self.config.num_attention_heads // tp_group.size()
        self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=self.config.params_dtype))
        tensor_parallel.set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        """As Megatron's `DotProductAttention`: sinks are cut over tensor-parallel ranks."""
        state = {} if self.softmax_offset is None else {"softmax_offset": self.softmax_offset}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, d], or [t, heads, d] when packed; s and t count this context-parallel rank's positions.
            key, value: the same with the heads of the key/value groups, which divide ``heads``; ``value`` may have
                another last dimension.
            attention_mask: None for causal; or bool, True = masked, broadcastable to [b, heads, s, s].
            packed_seq_params: cumulative lengths of the padded sequences over all context-parallel ranks; they must
                cover all positions.

        Returns:
            [s, b, heads * d_value], or [t, 1, heads * d_value].
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by CoreAttention: leave it out")
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is not None:
            query, key, value = (x.unsqueeze(1) if x.dim() == 3 else x for x in (query, key, value))
        with self._dropout_rng(dropout):
            if packed_seq_params is None and attention_mask is not None:
                return self._masked(query, key, value, attention_mask, dropout).flatten(2)
            rows = query.shape[1]
            lengths = [query.shape[0]] * rows
            if packed_seq_params is not None:
                lengths = _local_lengths(packed_seq_params, self.cp_group, query.shape[0])
            query, key, value = (_end_to_end(x) for x in (query, key, value))
            out = self._causal(query, key, value, tuple(lengths), dropout)
        return out.view(rows, -1, *out.shape[1:]).transpose(0, 1).flatten(2)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], dropout: float) -> Tensor:
        """Causal attention over concatenated sequences: ``[positions, heads, d]``."""
        size, rank = 1, 0
        if self.cp_group is not None:
            size, rank = self.cp_group.size(), self.cp_group.rank()
            order = zigzag_order(lengths, size, query.device)
            both = _GatherContext.apply(torch.cat([key, value], dim=-1), self.cp_group).index_select(0, order)
            key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        table, parts = None, segments(lengths, size, rank)
        if self.rotary is not None and len({self.rotary.is_long(length * size) for length in lengths}) > 1:
            query, key = turn_apart(query, key, [length * size for length in lengths], parts, self.rotary)
        elif self.rotary is not None:
            table = self.rotary(max(lengths) * size, query.device)
        return packed_attention(
            query,
            key,
            value,
            parts,
            scale=self.softmax_scale,
            rotary=table,
            window=self.window,
            softcap=self.softcap,
            sinks=self.softmax_offset,
            dropout=dropout,
        )

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float) -> Tensor:
        if any(part is not None for part in (self.cp_group, self.window, self.softcap, self.softmax_offset)):
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} with context parallelism, a sliding window, a soft cap or "
                "sinks: pass None, attention is causal"
            )
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.rotary is not None:
            table = self.rotary(query.shape[2], query.device)[:, : query.shape[2]]
            query, key = (rotate(x.transpose(1, 2), table).transpose(1, 2) for x in (query, key))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=~mask,
            dropout_p=dropout,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out.permute(2, 0, 1, 3)

    def _dropout_rng(self, dropout: float) -> contextlib.AbstractContextManager[Any]:
        # Heads differ over tensor-parallel ranks, so their dropout must too; as in DotProductAttention.
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()


def packed_params(cu_seqlens: Tensor) -> PackedSeqParams:
    """Megatron's description of packed sequences, for a model's ``packed_seq_params``.

    Args:
        cu_seqlens: [sequences + 1] int32, cumulative lengths over all context-parallel ranks, padding counted (as
            part of a sequence or as one of its own).
    """
    # The longest length must be exact: Megatron's rotary embedding takes a table as long as the whole pack for
    # positions that run on over sequences (`_apply_rotary_pos_emb_thd`).
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _end_to_end(x: Tensor) -> Tensor:
    """``[s, b, heads, d] -> [b * s, heads, d]``, row after row; a view where there is one row."""
    return x.squeeze(1) if x.shape[1] == 1 else x.transpose(0, 1).flatten(0, 1)


@lru_cache(maxsize=16)
def segments(lengths: tuple[int, ...], cp_size: int, cp_rank: int) -> Tensor:
    """What each of this rank's chunks of sequences attends to, for `packed_attention`: ``[chunks, 4]`` int64.

    Args:
        lengths: positions of each sequence on this rank; keys are those of whole sequences, in natural order.
    """
    rows, query, key = [], 0, 0
    for length in lengths:
        chunk = length // 2 if cp_size > 1 else length
        indices = (cp_rank, 2 * cp_size - 1 - cp_rank) if cp_size > 1 else (0,)
        for index in indices:
            rows.append((query, chunk, key, (index + 1) * chunk))
            query += chunk
        key += length * cp_size
    return torch.tensor(rows, dtype=torch.int64)


def turn_apart(
    query: Tensor, key: Tensor, lengths: Sequence[int], parts: Tensor, table: CosSinTable
) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned by the frequencies of each sequence, where not all have the same.

    Args:
        lengths: of whole sequences, whose keys lie end to end.
        parts: the `segments`, equally many for each sequence.
    """
    keys, queries, start = [], [], 0
    for length, rows in zip(lengths, parts.view(len(lengths), -1, 4).tolist(), strict=True):
        turns = table(length, query.device)
        keys.append(rotate(key[start : start + length], turns[:, :length]))
        queries += [rotate(query[q : q + n], turns[:, end - n : end]) for q, n, _, end in rows]
        start += length
    return torch.cat(queries), torch.cat(keys)


@lru_cache(maxsize=16)
def zigzag_order(lengths: tuple[int, ...], cp_size: int, device: torch.device) -> Tensor:
    """Where the positions of whole sequences, in natural order, stand in the concatenation of all ranks' positions.

    Args:
        lengths: positions of each sequence on one rank; even.

    Returns:
        [sum(lengths) * cp_size] int64 on ``device``.
    """
    total, start = sum(lengths), 0
    chunks = []
    with torch.inference_mode(False):  # a cached inference tensor could not be saved for a later backward
        for length in lengths:
            first = torch.arange(start, start + length // 2, device=device)
            chunks += [rank * total + first for rank in range(cp_size)]
            chunks += [rank * total + first + length // 2 for rank in reversed(range(cp_size))]
            start += length
        return torch.cat(chunks)


class _GatherContext(torch.autograd.Function):
    """All-gather along dimension 0 over the context-parallel ranks; the gradient is summed and scattered back."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(out, local.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


def _local_lengths(packed: PackedSeqParams, group: dist.ProcessGroup | None, positions: int) -> list[int]:
    """Positions of each sequence on this rank.

    Raises:
        ValueError: the sequences do not cover the positions, or cannot be split into ``2 * cp`` chunks.
    """
    cu_seqlens = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    lengths = cu_seqlens.diff().tolist()
    size = 1 if group is None else group.size()
    if group is not None and any(length % (2 * size) for length in lengths):
        raise ValueError(f"sequence lengths {lengths} with cp={size}: pad each to a multiple of {2 * size}")
    if sum(lengths) != positions * size:
        raise ValueError(
            f"cu_seqlens cover {sum(lengths)} positions, but {positions} positions * cp={size} were given: "
            f"count padding as a sequence of its own"
        )
    return [length // size for length in lengths if length]


def _looks_back(left: int, right: int) -> bool:
    """A window is over a fixed number of keys before each query, as `builder.py` writes it."""
    return left >= 0 and right == 0


def _refuse_other_kinds(config: TransformerConfig, mask_type: AttnMaskType, attention_type: str) -> None:
    refused = {
        "attention_type": (attention_type, attention_type == "self"),
        "attn_mask_type": (mask_type, mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)),
        "window_size": (config.window_size, config.window_size is None or _looks_back(*config.window_size)),
        "softmax_type": (config.softmax_type, config.softmax_type in ("vanilla", "learnable")),
    }
    for name, (given, good) in refused.items():
        if not good:
            raise ValueError(f"{name}={given} is not supported by the local core attention: it needs TransformerEngine")
