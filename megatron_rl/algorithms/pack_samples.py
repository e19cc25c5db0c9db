"""From samples to the packed tensors of a step, and the check for NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_rl.batch import Batch


class NotFiniteError(ValueError):
    """NaN or infinity among the numbers of a step; the message says which one and where."""


def pack_samples(batch: Batch, mask_truncated: bool = False) -> None:
    """Fill the batch's token and sequence fields from its samples, in place.

    Writes ``input_ids``, ``response_mask``, ``rollout_logprobs``, ``groups`` and ``rewards``.

    Args:
        mask_truncated: zero the response mask of samples that a limit ended.

    Raises:
        ValueError: a sample without reward.
        NotFiniteError: a reward that is NaN or infinite.
    """
    packed = Batch.from_samples(batch.samples)
    batch.cu_seqlens = packed.cu_seqlens
    batch.tokens.update(packed.tokens)
    batch.sequences = {**batch.sequences, **packed.sequences}
    rewards = batch.sequences.get("rewards")
    if rewards is None or rewards.numel() != len(batch.samples):
        missing = [i for i, sample in enumerate(batch.samples) if sample.reward is None]
        raise ValueError(f"{len(missing)} of {len(batch.samples)} samples have no reward, the first is {missing[:1]}")
    if not torch.isfinite(rewards).all():
        bad = int((~torch.isfinite(rewards)).nonzero()[0])
        prompt = batch.samples[bad].prompt.index
        raise NotFiniteError(f"reward {rewards[bad].item()} of sample {bad} (prompt {prompt}) is not a finite number")
    if mask_truncated:
        whole = torch.tensor([not sample.truncated for sample in batch.samples], dtype=torch.bool)
        batch.tokens["response_mask"] = batch["response_mask"] & whole[batch.sequence_ids]


def require_finite(batch: Batch, names: Iterable[str]) -> None:
    """Check token and sequence fields before they reach advantages; token fields only where the response mask is set.

    Raises:
        NotFiniteError: NaN or infinity; the message names the field, the sequence and the position in it.
    """
    for name in names:
        if name in batch.tokens:
            bad = ~torch.isfinite(batch[name]) & batch["response_mask"].bool()
            if bad.any():
                place = int(bad.nonzero()[0])
                sequence = int(batch.sequence_ids[place])
                offset = place - int(batch.cu_seqlens[sequence])
                raise NotFiniteError(
                    f"{name} = {batch[name][place].item()} at token {offset} of sequence {sequence}: "
                    "expected finite numbers; look at the weights and at the temperature"
                )
        elif name in batch.sequences and not torch.isfinite(batch[name]).all():
            sequence = int((~torch.isfinite(batch[name])).nonzero()[0])
            raise NotFiniteError(
                f"{name} = {batch[name][sequence].item()} for sequence {sequence}: expected finite numbers"
            )
