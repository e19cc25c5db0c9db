"""Mismatched prompts and responses, for KTO's estimate of the KL."""

from __future__ import annotations

import torch

from megatron_rl.batch import Batch


def exchange_responses(batch: Batch) -> Batch:
    """Each sequence's prompt followed by the *next* sequence's response (the last gets the first's).

    The prompt is everything before a sequence's first response token; a sequence without any is all prompt and lends
    an empty response. With a single sequence the result is the batch itself. Reads ``input_ids`` and
    ``response_mask``; only these are in the result.
    """
    token_ids = [part.tolist() for part in torch.split(batch["input_ids"], batch.lengths.tolist())]
    masks = [part.int().tolist() for part in torch.split(batch["response_mask"], batch.lengths.tolist())]
    starts = [mask.index(1) if 1 in mask else len(mask) for mask in masks]
    order = [*range(1, len(masks)), 0] if masks else []
    exchanged = Batch.from_sequences(
        [token_ids[i][: starts[i]] + token_ids[j][starts[j] :] for i, j in enumerate(order)],
        [[0] * starts[i] + masks[j][starts[j] :] for i, j in enumerate(order)],
    )
    exchanged.temperature = batch.temperature
    return exchanged
