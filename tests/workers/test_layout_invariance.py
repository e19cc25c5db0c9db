"""GRPO on real Megatron-Core gives the same numbers on every layout, by real torchrun.

The oracle of the log-probabilities is `transformers`; losses, gradient norms and metrics of each layout are compared
with one process.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import run_ranks

PROGRAM = Path(__file__).with_name("layout_cases.py")
WORLDS = {
    1: ("one", "one_padded", "one_small_budget", "one_empty_rows"),
    2: ("tp2", "pp2", "dp2", "cp2", "cp2_padded", "tp2_sp", "tp2_padded", "pp2vpp2", "tp2_recompute"),
    4: ("tp2pp2", "tp2cp2", "dp2pp2", "dp4", "pp2vpp2_small_budget"),
}

pytestmark = pytest.mark.distributed


@functools.cache
def results(model: str) -> dict[str, dict]:
    found = {}
    for world, cases in WORLDS.items():
        for line in run_ranks(PROGRAM, world, model, *cases, timeout=400).splitlines():
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
                found[result["case"]] = result
    return found


@pytest.mark.parametrize("case", [case for cases in WORLDS.values() for case in cases])
def test_layout_does_not_change_loss_gradient_or_logprobs(stories_model, case):
    one, other = results(str(stories_model))["one"], results(str(stories_model))[case]
    assert torch.allclose(torch.tensor(other["logprobs"]), torch.tensor(one["logprobs"]), atol=1e-4, rtol=1e-5)
    for name in ("loss/total", "loss/policy", "loss/kl", "optimizer/gradient_norm", "policy/entropy"):
        tolerance = 5e-5 if name == "loss/kl" else 1e-5  # exp(d) - d - 1 of small d: the terms cancel
        assert math.isclose(other["metrics"][name], one["metrics"][name], rel_tol=tolerance, abs_tol=1e-7), name
    assert one["metrics"]["optimizer/gradient_norm"] > 1e-3


def test_logprobs_of_responses_equal_those_of_transformers(stories_model):
    sys.path.insert(0, str(PROGRAM.parent))
    program = (
        "import sys, json, torch; sys.path.insert(0, sys.argv[2]); from layout_cases import samples;"
        "from transformers import AutoModelForCausalLM as M; m = M.from_pretrained(sys.argv[1], dtype=torch.float64);"
        "out = []\n"
        "for s in samples():\n"
        "    ids = torch.tensor([s.prompt.token_ids + s.response_ids])\n"
        "    with torch.no_grad(): logits = m(ids).logits / 0.8\n"
        "    seen = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()\n"
        "    first = len(s.prompt.token_ids)\n"
        "    out += [0.0] * first + seen[first - 1 :]\n"
        "print(json.dumps(out))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(stories_model), str(PROGRAM.parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    expected = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert torch.allclose(torch.tensor(results(str(stories_model))["one"]["logprobs"]), expected, atol=2e-4, rtol=1e-5)
