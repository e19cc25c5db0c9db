"""Batches: packing of samples, selection, and errors that list what is there."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.batch import Batch, Prompt, Sample


def samples() -> list[Sample]:
    first = Sample(Prompt([1, 2]), [3, 4, 5], [-1.0, -2.0, -3.0], group=0, reward=1.0)
    second = Sample(Prompt([6]), [7, 8], [-4.0, -5.0], response_mask=[1, 0], group=1, reward=0.5)
    return [first, second]


def test_samples_are_packed_end_to_end_with_values_at_their_own_tokens():
    batch = Batch.from_samples(samples())
    assert batch.cu_seqlens.tolist() == [0, 5, 8]
    assert batch["input_ids"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch["response_mask"].tolist() == [False, False, True, True, True, False, True, False]
    assert batch["rollout_logprobs"].tolist() == [0, 0, -1, -2, -3, 0, -4, -5]
    assert batch["rewards"].tolist() == [1.0, 0.5]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_rewards_are_absent_until_every_sample_has_one():
    rows = samples()
    rows[1].reward = None
    assert "rewards" not in Batch.from_samples(rows)


def test_selection_keeps_order_fields_and_temperature():
    batch = Batch.from_samples(samples())
    batch.temperature = 0.7
    part = batch.select([1, 0])
    assert part["input_ids"].tolist() == [6, 7, 8, 1, 2, 3, 4, 5]
    assert part["rewards"].tolist() == [0.5, 1.0]
    assert part.samples[0].reward == 0.5
    assert part.temperature == 0.7


def test_selection_of_nothing_is_an_empty_batch():
    part = Batch.from_samples(samples()).select([])
    assert part.num_sequences == 0
    assert part.num_tokens == 0
    assert part["input_ids"].dtype == torch.int64


def test_an_absent_field_is_named_with_those_present():
    with pytest.raises(KeyError, match="no field 'values'; it has samples, input_ids"):
        Batch.from_samples(samples())["values"]
