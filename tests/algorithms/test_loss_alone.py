"""Losses as functions of a configuration and of tensors, without any worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from algorithms.ragged import make_inputs
from algorithms.stand_ins import StandInWorker
from algorithms.test_masked_positions import SEQUENCES, rows

from megatron_rl.algorithms import ALGORITHMS, DPO, GRPO, PPO, RLOO
from megatron_rl.config import ConfigError


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_loss_without_workers_is_that_of_the_algorithm_with_them(name):
    kind = ALGORITHMS[name]
    config = {"norm_length": 9} if name == "dr-grpo" else {}
    recompute = {"old_logprobs": "recompute"} if "old_logprobs" in kind.Config.model_fields else {}
    inputs, same = (make_inputs(rows(), sequences=SEQUENCES) for _ in range(2))
    if name == "reward-model":
        algorithm = kind(StandInWorker("critic"))
    else:
        algorithm = kind(StandInWorker(), StandInWorker("reference"), StandInWorker("critic"), config, **recompute)
    found, expected = kind.loss_fn(config, inputs), algorithm.loss(same)
    assert torch.equal(found.loss, expected.loss)
    for mine, theirs in ((inputs.logprobs, same.logprobs), (inputs.values, same.values)):
        left = torch.autograd.grad(found.loss, mine, allow_unused=True, retain_graph=True)[0]
        right = torch.autograd.grad(expected.loss, theirs, allow_unused=True, retain_graph=True)[0]
        assert (left is None and right is None) or torch.equal(left, right)
    assert set(found.metrics) == set(expected.metrics)


def test_a_clipped_loss_by_hand():
    inputs = make_inputs(
        [{"mask": [1, 1], "logprobs": [-1.0, -2.0], "old_logprobs": [-1.0, -3.0], "advantages": [2.0, 1.0]}]
    )
    output = GRPO.loss_fn({"clip_high": 0.2, "loss_aggregation": "token-sum"}, inputs)
    assert output.loss.item() == pytest.approx(-2.0 - 1.2)
    assert GRPO.loss_fn(GRPO.Config(old_logprobs="current"), inputs).loss.item() == pytest.approx(-1.5)


def test_the_reference_and_the_critic_are_what_the_inputs_hold():
    inputs = make_inputs(rows(), sequences=SEQUENCES)
    assert "loss/kl" in GRPO.loss_fn(None, inputs).metrics
    assert "loss/kl" not in RLOO.loss_fn(None, inputs).metrics  # its KL is in the reward
    critic = PPO.without_workers(value_clip=None).critic_loss(inputs)
    mask = inputs.fields["response_mask"]
    expected = 0.5 * (inputs.values - inputs.fields["returns"])[mask].square().mean()
    assert critic.loss.item() == pytest.approx(expected.item())


def test_what_needs_a_model_says_that_there_is_none():
    with pytest.raises(AttributeError, match="made without workers"):
        GRPO.without_workers(num_epochs=2).update()
    with pytest.raises(ConfigError, match="did you mean 'beta'"):
        DPO.loss_fn({"betta": 0.1}, make_inputs(rows()))


def test_the_example_of_the_docs_runs():
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    found: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], found)
    assert found["output"].loss.item() == pytest.approx(-1.6)
    assert found["inputs"].logprobs.grad.tolist() == [-1.0, 0.0, 0.0]
