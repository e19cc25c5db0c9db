"""Placing a response's reward on its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.batch import Batch


def at_last_token(batch: Batch, per_sequence: Tensor) -> Tensor:
    """``[num_sequences] -> [num_tokens]``: the value at each sequence's last response token, 0 elsewhere.

    A sequence without response tokens loses its value: it has no action that could have earned it.
    """
    steps = batch["response_mask"].bool().nonzero().squeeze(1)
    owner = batch.sequence_ids[steps]
    last = torch.full((batch.num_sequences,), -1, dtype=torch.int64).scatter_reduce(0, owner, steps, "amax")
    answered = last >= 0
    placed = per_sequence.new_zeros(batch.num_tokens)
    placed[last[answered]] = per_sequence[answered]
    return placed
