"""What stands off the response mask is never looked at: NaN and infinity there change no loss, gradient or metric."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from algorithms.ragged import make_inputs
from algorithms.stand_ins import StandInWorker

from megatron_rl.algorithms import ALGORITHMS
from megatron_rl.algorithms.kl import k3, kl_penalty
from megatron_rl.algorithms.logistic import logistic_loss
from megatron_rl.workers.loss import LossInputs, LossOutput

MASKS = [[0, 1, 1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0], [1, 1, 0, 0], [0, 0, 0], [0, 1, 0]]
RATIO = {"old_logprobs": "recompute", "kl_in": "loss", "kl_coefficient": 0.1, "entropy_coefficient": 0.01}
WEIGHED = {**RATIO, "correction": {"level": "token", "mode": "mask", "lower": 0.7, "upper": 1.4}}
WHOLE = {**RATIO, "correction": {"level": "sequence", "veto": 0.3, "reject": "geometric"}}
CASES: dict[str, list[dict]] = {
    "grpo": [WEIGHED, {**RATIO, "dual_clip": 2.0, "kl_estimator": "k2"}],
    "dr-grpo": [{**WEIGHED, "norm_length": 9}],
    "dapo": [WEIGHED],
    "gspo": [WHOLE, {**WHOLE, "token_form": True}],
    "gmpo": [WHOLE],
    "cispo": [WEIGHED],
    "sapo": [WEIGHED],
    "rloo": [WHOLE],
    "reinforce++": [WEIGHED],
    "reinforce++-baseline": [WEIGHED],
    "ppo": [WEIGHED, {**WEIGHED, "shared_critic": True}, {**WEIGHED, "shared_critic": True, "value_clip": None}],
    "dpo": [{"loss": name, "label_smoothing": 0.1 * (name == "exo_pair")} for name in ("sigmoid", "ipo", "exo_pair")],
}
SEQUENCES = {"labels": [True, False, True, False, True, False], "kl_logratio": [0.3] * 6, "margins": [0.5] * 6}


def rows() -> list[dict[str, list[float]]]:
    draw = random.Random(5)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    found = []
    for mask in MASKS:
        row: dict[str, list[float]] = {name: [-draw.expovariate(1.0) - 0.1 for _ in mask] for name in names}
        for name in ("advantages", "values", "current_values", "returns"):
            row[name] = [draw.gauss(0, 1) for _ in mask]
        found.append({"mask": mask, "entropy": [draw.random() for _ in mask], "staleness": [0.0] * len(mask), **row})
        found[-1]["response_starts"] = [float(t == mask.index(1)) if 1 in mask else 0.0 for t in range(len(mask))]
    return found


def outcome(loss, inputs: LossInputs) -> tuple[LossOutput, list[torch.Tensor]]:
    leaves = [inputs.logprobs, inputs.entropy, inputs.values]
    output = loss(inputs)
    gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True)
    return output, [
        torch.zeros_like(leaf) if found is None else found for leaf, found in zip(leaves, gradients, strict=True)
    ]


def losses(name: str):
    kind, worker = ALGORITHMS[name], StandInWorker()
    for config in CASES.get(name, [{}]):
        if name == "reward-model":
            algorithm = kind(StandInWorker("critic"), use_margins=True)
        else:
            algorithm = kind(worker, StandInWorker("reference"), StandInWorker("critic"), config)
        yield algorithm.loss
        if name == "ppo":
            yield algorithm.critic_loss


@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_anything_off_the_mask_leaves_loss_gradients_and_metrics_as_they_are(name, junk):
    for loss in losses(name):
        clean = make_inputs(rows(), sequences=SEQUENCES)
        expected, gradients = outcome(loss, clean)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
        off = ~clean.fields["response_mask"]
        for field in ("logprobs", "entropy", "values", *(set(clean.fields) - {"response_mask"})):
            inputs = make_inputs(rows(), sequences=SEQUENCES)
            if field in inputs.fields and not hasattr(inputs, field):
                inputs = replace(inputs, fields={**inputs.fields, field: inputs.fields[field].masked_fill(off, junk)})
            elif field == "values":
                old = inputs.fields["values"].masked_fill(off, junk)
                new = inputs.values.detach().masked_fill(off, junk).requires_grad_()
                inputs = replace(inputs, values=new, fields={**inputs.fields, "values": old})
            else:
                given = getattr(inputs, field).detach().masked_fill(off, junk).requires_grad_()
                inputs = replace(inputs, **{field: given})
            found, changed = outcome(loss, inputs)
            assert torch.equal(found.loss, expected.loss), field
            for mine, theirs in zip(changed, gradients, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=field)
            for key, metric in expected.metrics.items():
                assert torch.equal(found.metrics[key].total, metric.total), (field, key)
                assert torch.equal(found.metrics[key].weight, metric.weight), (field, key)


def test_k3_is_never_below_zero_and_exact_where_the_policies_nearly_agree():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator) * 10.0 ** (-8 * torch.rand(200_000, generator=generator))
    found = k3(x)
    assert (found >= 0).all()
    assert (torch.exp(x) - 1.0 - x < 0).any()  # what it replaces
    tiny = torch.tensor([1e-3, -1e-5, 1e-7], dtype=torch.float64)
    series = tiny.square() / 2 + tiny.pow(3) / 6 + tiny.pow(4) / 24
    torch.testing.assert_close(k3(tiny), series, rtol=1e-8, atol=1e-22)
    zeros = torch.zeros_like(x)
    assert (kl_penalty(x, zeros, "k3") >= 0).all()


@pytest.mark.parametrize("x", [-750.0, -50.0, -21.0, -1.0, 0.0, 1.0, 19.9, 20.1, 25.0, 36.0, 700.0])
def test_the_logistic_loss_is_exact_in_float64_on_both_sides_of_twenty(x):
    given = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = logistic_loss(given)
    (slope,) = torch.autograd.grad(value, given)
    expected = math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))
    inverse = math.exp(-x) / (1 + math.exp(-x)) if x > 0 else 1 / (1 + math.exp(x))
    assert value.item() == pytest.approx(expected, rel=1e-14, abs=0)
    assert slope.item() == pytest.approx(-inverse, rel=1e-14, abs=0)


@pytest.mark.parametrize("name", ["dpo", "simpo", "cpo", "reward-model", "bco"])
def test_far_apart_pairs_keep_their_small_side_in_float64(name):
    """Margins of 30 nats: softplus would be linear there, and its gradient 1."""
    far = {"mask": [1], "logprobs": [-40.0], "ref_logprobs": [-10.0], "current_values": [-15.0]}
    near = {"mask": [1], "logprobs": [-10.0], "ref_logprobs": [-10.0], "current_values": [15.0]}
    config = {"simpo": {"gamma": 0.0}, "cpo": {"sft_weight": 0.0}}.get(name, {})
    if name == "reward-model":
        loss = ALGORITHMS[name](StandInWorker()).loss
    else:
        loss = ALGORITHMS[name](StandInWorker(), StandInWorker("reference"), config={"beta": 1.0, **config}).loss
    inputs = make_inputs([far, near], sequences={"labels": [True, False]})  # chosen is 30 below rejected
    output = loss(inputs)
    leaf = inputs.values if name == "reward-model" else inputs.logprobs
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    small = math.log1p(math.exp(-30.0))
    expected, share = ((30.0 + small + math.log(2.0)) / 2, 0.5) if name == "bco" else (30.0 + small, 1.0)
    assert output.loss.item() == pytest.approx(expected, rel=1e-15, abs=0)
    assert abs(gradient[0].item()) == pytest.approx(share / (1 + math.exp(-30.0)), rel=1e-15, abs=0)
