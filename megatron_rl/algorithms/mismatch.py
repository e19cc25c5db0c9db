"""Mismatched prompts and responses, for KTO's estimate of the KL."""

from __future__ import annotations

import itertools

from megatron_rl.batch import Batch


def partners(count: int) -> list[int]:
    """Whose response each of ``count`` sequences gets: neighbours 2i and 2i + 1 swap; of an odd number the last three
    rotate. Data-parallel ranks with even, contiguous shares therefore make the same exchanges as one rank would."""
    order = [i ^ 1 for i in range(count)]
    if count % 2:
        order[-3:] = [count - 2, count - 1, count - 3] if count > 1 else [0]
    return order


def exchange_responses(batch: Batch) -> Batch:
    """Each sequence's prompt followed by its partner's response.

    The prompt is everything before a sequence's first response token; a sequence without any is all prompt and lends
    an empty response. With a single sequence the result is the batch itself. Reads ``input_ids`` and
    ``response_mask``; only these are in the result.
    """
    bounds = batch.cu_seqlens.tolist()
    spans = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    token_ids = [batch["input_ids"][span].tolist() for span in spans]
    masks = [batch["response_mask"][span].int().tolist() for span in spans]
    starts = [mask.index(1) if 1 in mask else len(mask) for mask in masks]
    pairs = list(enumerate(partners(len(spans))))
    exchanged = Batch.from_sequences(
        [token_ids[i][: starts[i]] + token_ids[j][starts[j] :] for i, j in pairs],
        [[0] * starts[i] + masks[j][starts[j] :] for i, j in pairs],
    )
    exchanged.temperature = batch.temperature
    return exchanged
