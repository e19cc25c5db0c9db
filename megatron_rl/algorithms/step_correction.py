"""The part of the rollout correction that needs all samples of a step: normalised weights, and denominators after
rejection."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_rl.algorithms.importance import masked_log_ratio
from megatron_rl.algorithms.moments import masked_moments
from megatron_rl.algorithms.rollout_correction import RolloutCorrection, correct
from megatron_rl.batch import Batch
from megatron_rl.workers.loss import LossInputs, Totals


def correct_step(batch: Batch, old: str, correction: RolloutCorrection, group: dist.ProcessGroup | None) -> None:
    """Write ``correction_weights`` and, with denominators "kept", narrow ``response_mask`` to that. Collective.

    Weights are normalised over tokens at level token, else over responses (as verl's ``rollout_is_batch_normalize``).
    ``mismatch/dropped_fraction`` and ``mismatch/vetoed_fraction`` are of the tokens before any was left out.

    Args:
        old: token field of the trainer's log-probabilities.
        group: the data-parallel ranks.
    """
    mask = batch["response_mask"].bool().clone()
    starts = batch.cu_seqlens[:-1]
    mask[starts[starts < mask.numel()]] = False  # nothing predicts a first token
    inputs = LossInputs(
        logprobs=batch[old],
        fields={"response_mask": mask},
        sequences={},
        sequence_ids=batch.sequence_ids,
        num_sequences=batch.num_sequences,
        totals=Totals(1.0, 1.0),
    )
    found = correct(inputs, masked_log_ratio(inputs, batch[old], batch["rollout_logprobs"]), correction)
    batch.metrics |= {
        "mismatch/dropped_fraction": masked_moments((~found.kept).float(), mask, group).mean,
        "mismatch/vetoed_fraction": masked_moments(found.vetoed.float(), mask, group).mean,
    }
    weights = found.weights
    counted = mask & found.kept if correction.denominators == "kept" else mask
    if correction.normalize:
        values, places = weights, counted
        if correction.level != "token":  # one weight a response, also of one whose tokens are dropped in part
            fields = {"response_mask": counted}
            part = LossInputs(batch[old], fields, {}, batch.sequence_ids, batch.num_sequences, inputs.totals)
            values, places = part.sequence_mean(weights), part.sequence_sum(part.mask) > 0
        mean = masked_moments(values, places, group).mean
        weights = weights / mean if mean > 0 else weights
    batch.tokens["correction_weights"] = torch.where(mask, weights, 0.0)
    if correction.denominators == "kept":
        batch.tokens["response_mask"] = batch["response_mask"] & (found.kept | ~mask)
