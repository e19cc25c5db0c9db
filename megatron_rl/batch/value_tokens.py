"""Reward models: the one token of each sequence whose value is the sequence's reward.

A sequence's reward is the value head's output at its last token, as in Hugging Face's sequence classifiers. Values are
predictor-aligned (position p holds what belongs to token p + 1), so one token is appended to each sequence, and the
reward is the value at that token: it is computed from the sequence alone, the appended token is never attended to.
"""

from __future__ import annotations

import torch

from megatron_rl.batch import Batch


def append_value_tokens(batch: Batch, pad_token_id: int | None = None) -> None:
    """Append one token to each sequence and mask exactly these, in place; other token fields are dropped.

    The appended id is 0; no other token sees it.

    Args:
        pad_token_id: trailing tokens of this id are dropped first, but for a sequence's first token.
    """
    parts = torch.split(batch["input_ids"], batch.lengths.tolist()) if batch.num_sequences else ()
    rows = [without_padding(part.tolist(), pad_token_id) for part in parts]
    extended = Batch.from_sequences([[*row, 0] for row in rows], [[0] * len(row) + [1] for row in rows])
    batch.cu_seqlens, batch.tokens = extended.cu_seqlens, extended.tokens


def without_padding(row: list[int], pad_token_id: int | None) -> list[int]:
    """``row`` up to its last token that is not padding; at least one token."""
    length = len(row)
    while length > 1 and row[length - 1] == pad_token_id:
        length -= 1
    return row[:length]
