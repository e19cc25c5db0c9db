"""A GRPO loss of episodes by hand: observations have no part in it, and samples keep through the journal's bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from algorithms.ragged import make_inputs
from environments.playing import engine, play, prompts
from environments.test_episodes import TURN, counting, flat

from megatron_rl.algorithms import GRPO
from megatron_rl.batch.record_bytes import from_bytes, to_bytes
from megatron_rl.environments import Transcript


@pytest.fixture(scope="module")
def transcripts() -> list[Transcript]:
    found = flat(play(counting(), prompts(3), engine(), TURN))
    assert any(0 in transcript.mask for transcript in found)
    return found


def rows(transcripts: list[Transcript], of_observations: float) -> list[dict[str, list[float]]]:
    """Each token's log-probability has moved by 0.3, up and down in turns; those of observations are given."""
    found: list[dict[str, list[float]]] = []
    for number, transcript in enumerate(transcripts):
        moved = [
            logprob + 0.3 * (-1) ** place if bit else of_observations
            for place, (logprob, bit) in enumerate(zip(transcript.logprobs, transcript.mask, strict=True))
        ]
        columns: dict[str, Any] = {"mask": transcript.mask, "logprobs": moved, "rollout_logprobs": transcript.logprobs}
        found.append(columns | {"advantages": [float(number - 2)] * len(moved)})
    return found


@pytest.mark.parametrize("of_observations", [-1.0, -1e4, math.nan])
def test_the_loss_is_the_mean_over_generated_tokens(transcripts: list[Transcript], of_observations: float) -> None:
    inputs = make_inputs(rows(transcripts, of_observations))
    config = {"loss_aggregation": "token-mean", "clip_low": 0.2, "clip_high": 0.2, "old_logprobs": "rollout"}
    output = GRPO.loss_fn(config, inputs)
    terms: list[float] = []
    for number, transcript in enumerate(transcripts):
        for place, bit in enumerate(transcript.mask):
            ratio, advantage = math.exp(0.3 * (-1) ** place), float(number - 2)
            if bit:
                terms.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
    assert output.loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    (gradient,) = torch.autograd.grad(output.loss, inputs.logprobs)
    generated = torch.tensor([bool(bit) for transcript in transcripts for bit in transcript.mask])
    assert not gradient[~generated].any()
    assert gradient[generated].any()


def test_an_episodes_sample_comes_back_from_bytes(transcripts: list[Transcript]) -> None:
    for transcript in transcripts:
        sample = transcript.as_sample(prompts(1)[0], 0, 1.0)
        assert from_bytes(to_bytes(sample)) == sample
