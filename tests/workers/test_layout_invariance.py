"""GRPO on real Megatron-Core gives the same numbers on every layout, over real processes.

The oracle of the log-probabilities is `transformers`; losses, gradient norms and metrics of each layout are compared
with one process.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from forked import run_ranks
from transformers import AutoModelForCausalLM
from workers.layout_cases import samples

PROGRAM = Path(__file__).with_name("layout_cases.py")
WORLDS = {
    1: ("one", "one_padded", "one_small_budget", "one_empty_rows"),
    2: ("tp2", "pp2", "dp2", "cp2", "cp2_padded", "tp2_sp", "tp2_padded", "pp2vpp2", "tp2_recompute"),
    4: ("tp2pp2", "tp2cp2", "dp2pp2", "dp4", "pp2vpp2_small_budget"),
}

OF_REAL_MODEL = {1: ("one",), 4: ("tp2pp2", "tp2cp2", "dp2pp2")}  # every axis, with real weights where they are at hand
MODELS = {"seeded_model": WORLDS} | ({"stories_model": OF_REAL_MODEL} if SHARED else {})
CASES = [(model, case) for model, worlds in MODELS.items() for cases in worlds.values() for case in cases]

pytestmark = pytest.mark.distributed


@functools.cache
def results(folder: Path, model: str) -> dict[str, dict]:
    found = {}
    for world, cases in MODELS[model].items():
        for line in run_ranks(PROGRAM, world, folder, *cases, timeout=400).splitlines():
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
                found[result["case"]] = result
    return found


@pytest.mark.parametrize(("model", "case"), CASES)
def test_layout_does_not_change_loss_gradient_or_logprobs(request, model, case):
    found = results(request.getfixturevalue(model), model)
    one, other = found["one"], found[case]
    assert torch.allclose(torch.tensor(other["logprobs"]), torch.tensor(one["logprobs"]), atol=1e-4, rtol=1e-5)
    for name in ("loss/total", "loss/policy", "loss/kl", "optimizer/gradient_norm", "policy/entropy"):
        tolerance = 5e-5 if name == "loss/kl" else 1e-5  # exp(d) - d - 1 of small d: the terms cancel
        assert math.isclose(other["metrics"][name], one["metrics"][name], rel_tol=tolerance, abs_tol=1e-7), name
    assert one["metrics"]["optimizer/gradient_norm"] > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_logprobs_of_responses_equal_those_of_transformers(request, model):
    folder = request.getfixturevalue(model)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = []
    for sample in samples():
        ids = torch.tensor([sample.prompt.token_ids + sample.response_ids])
        with torch.no_grad():
            logits = reference(ids).logits / 0.8
        seen = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()
        first = len(sample.prompt.token_ids)
        expected += [0.0] * first + seen[first - 1 :]
    expected = torch.tensor(expected)
    assert torch.allclose(torch.tensor(results(folder, model)["one"]["logprobs"]), expected, atol=2e-4, rtol=1e-5)
