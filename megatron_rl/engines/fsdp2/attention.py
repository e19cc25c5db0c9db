"""The attention function that modules of `transformers` call here: packed sequences, or rows, without a mask.

It is registered with `AttentionInterface` under `NAME`. With ``cu_seq_lens_q`` (a keyword of flash attention, which
such modules hand through) a row holds several sequences end to end; without it each row is one sequence, padding last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from megatron_rl.ops.packed_attention import packed_attention, whole_sequences

NAME = "megatron_rl_packed"
REFUSED = ("position_bias", "indices", "block_indices")  # keywords of what `packed_attention` does not compute


class NotPackableError(ValueError):
    """A module asks of attention what is not computed here."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """``[rows, heads, columns, dim] -> [rows, columns, heads, value_dim]``; ``s_aux`` are attention sinks.

    Raises:
        NotPackableError: a mask, or something else that is not computed here, was asked for.
    """
    asked = [name for name in REFUSED if given.get(name) is not None]
    if _has_window_in_mask(module) and sliding_window is None:
        asked.append("sliding_window, in its mask alone")
    if attention_mask is not None or asked or not getattr(module, "is_causal", True):
        raise NotPackableError(f"{type(module).__name__} asks for {asked or 'a mask'}")
    rows, _, columns, _ = query.shape
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    out = packed_attention(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        whole_sequences(torch.arange(rows + 1) * columns if cu_seq_lens_q is None else cu_seq_lens_q),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
    )
    return out.unflatten(0, (rows, columns)), None


def _has_window_in_mask(module: nn.Module) -> bool:
    """Whether a layer has a window, as its config says; most modules hand it to attention as well."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and index is not None:
        return bool(kinds[index] == "sliding_attention")
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def no_mask(*_: Any, **__: Any) -> None:
    """The mask of every attention: none."""


def register() -> None:
    """Make `NAME` known to `transformers`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, no_mask)
