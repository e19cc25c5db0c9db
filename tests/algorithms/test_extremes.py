"""Losses and gradients far from where training should be: hundreds of nats, thousands of points of reward, in fp32."""

from __future__ import annotations

import math

import pytest
import torch
from algorithms.ragged import check_against_oracle, make_inputs
from algorithms.stand_ins import StandInWorker
from algorithms.test_labelled import LABELS, bco_term, build, kto_term, labelled_rows
from algorithms.test_labelled import average as average_labelled
from algorithms.test_preference import FREE, average, dpo

from megatron_rl.algorithms import ALGORITHMS, BCO, KTO, PAIR_LOSSES, RewardModelling


@pytest.mark.parametrize("name", list(PAIR_LOSSES))
def test_loss_and_gradient_stay_finite_in_fp32_when_a_response_is_a_thousand_nats_away(name):
    for sign in (1.0, -1.0):
        rows = [
            {"mask": [1, 1], "logprobs": [-600.0, -600.0], "ref_logprobs": [-600.0 + sign * 500, -600.0 + sign * 500]},
            {"mask": [1], "logprobs": [-2.0], "ref_logprobs": [-2.0]},
        ]
        inputs = make_inputs(rows, dtype=torch.float32)
        config = {"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {}
        output = dpo(loss=name, **config).loss(inputs)
        (gradient,) = torch.autograd.grad(output.loss, inputs.logprobs, allow_unused=True)
        if name == "discopop" and sign > 0:
            continue  # its exponential term is e^100 here, by definition
        assert math.isfinite(output.loss.item())
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("case", FREE)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_reference_free_loss_is_exact_in_fp32_hundreds_of_nats_away(case, sign):
    """The chosen response 400 nats a token above or below the rejected one."""
    name, config, term = FREE[case]
    far = {"mask": [1, 1], "logprobs": [-400.0, -401.0]}
    near = {"mask": [1, 1, 1], "logprobs": [-0.5, -0.25, -0.125]}
    rows = [near, far] if sign > 0 else [far, near]
    check_against_oracle(
        ALGORITHMS[name](actor=StandInWorker(), **config).loss, lambda rows: average(rows, term), rows, rtol=1e-5
    )
    inputs = make_inputs(rows, dtype=torch.float32)
    output = ALGORITHMS[name](actor=StandInWorker(), **config).loss(inputs)
    assert torch.isfinite(torch.autograd.grad(output.loss, inputs.logprobs)[0]).all()


def test_orpo_is_finite_for_a_certain_response_and_for_an_impossible_one():
    rows = [{"mask": [1, 1], "logprobs": [0.0, 0.0]}, {"mask": [1], "logprobs": [-1000.0]}]
    for order in (rows, rows[::-1]):
        inputs = make_inputs(order, dtype=torch.float32)
        output = ALGORITHMS["orpo"](actor=StandInWorker()).loss(inputs)
        (gradient,) = torch.autograd.grad(output.loss, inputs.logprobs)
        assert math.isfinite(output.loss.item())
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("gap", [5e3, -5e3])
def test_reward_model_loss_is_exact_in_fp32_for_rewards_thousands_apart(gap):
    rows = [{"mask": [0, 1], "logprobs": [0.0] * 2, "current_values": [0.0, x]} for x in (gap, -gap)]
    inputs = make_inputs(rows, dtype=torch.float32)
    output = RewardModelling(StandInWorker("critic")).loss(inputs)
    (gradient,) = torch.autograd.grad(output.loss, inputs.values)
    assert output.loss.item() == (0.0 if gap > 0 else 1e4)
    assert gradient.tolist() == [0.0, 0.0 if gap > 0 else -1.0, 0.0, 0.0 if gap > 0 else 1.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", [BCO, KTO])
def test_loss_is_exact_in_fp32_for_log_ratios_of_hundreds_of_nats(kind, sign):
    rows = labelled_rows()
    for row in rows:
        row["logprobs"] = [r + sign * 400.0 for r in row["ref_logprobs"]]
    config = {"estimate_kl": False} if kind is KTO else {}
    term = kto_term(0.1, 0.0, 1.0, 1.0) if kind is KTO else bco_term(0.1, 0.0)
    fields = {"labels": LABELS}
    check_against_oracle(build(kind, **config).loss, lambda rows: average_labelled(rows, term), rows, fields, rtol=1e-5)
    inputs = make_inputs(rows, dtype=torch.float32, sequences=fields)
    assert torch.isfinite(torch.autograd.grad(build(kind, **config).loss(inputs).loss, inputs.logprobs)[0]).all()
