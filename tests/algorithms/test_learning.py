"""Every algorithm learns, on a real pretrained model and real Megatron-Core, over two layouts.

Online: the mean share of generated tokens with an "s", 0.10 at first, over the last two of ten steps. Preferences: by
how many nats the happy ending is likelier than the sad one on prompts never trained on, and how often.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from forked import run_ranks

PROGRAM = Path(__file__).with_name("learning_program.py")
ONLINE = [
    "grpo",
    "dr-grpo",
    "dapo",
    "gspo",
    "gmpo",
    "cispo",
    "sapo",
    "rloo",
    "opo",
    "reinforce++",
    "reinforce++-baseline",
    "ppo",
]
OFFLINE = ["dpo", "kto", "bco", "orpo", "simpo", "cpo", "sft", "reward-model"]
LAYOUTS = {"tp2": "2", "dp2": "1"}  # tensor-parallel size; two ranks each

pytestmark = [pytest.mark.learning, pytest.mark.distributed]


@functools.cache
def results(model: str, layout: str) -> dict[str, dict[str, float]]:
    out = run_ranks(PROGRAM, 2, model, LAYOUTS[layout], *ONLINE, *OFFLINE, timeout=580)
    found = [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT ")]
    return {result["algorithm"]: result for result in found}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ONLINE)
def test_reward_rises_to_at_least_twice_what_it_was(stories_model, name, layout):
    result = results(str(stories_model), layout)[name]
    assert result["before"] < 0.2
    assert result["after"] > 2 * result["before"], result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OFFLINE)
def test_preference_is_learnt_and_holds_on_unseen_prompts(stories_model, name, layout):
    result = results(str(stories_model), layout)[name]
    assert result["loss_after"] < 0.5 * result["loss_before"], result
    assert result["after"] > result["before"] + 1.0, result
    assert result["accuracy_after"] >= 0.9, result
