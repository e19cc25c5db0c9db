"""Every algorithm learns on real Megatron-Core; three of them also on two layouts of two ranks, once from real weights
where they are.

Online: the mean share of generated tokens with an "s", 0.10 at first, over the last two of ten steps. Preferences: by
how many nats the happy ending is likelier than the sad one on prompts never trained on, and how often.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SHARED
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
LAYOUTS = {"one": (1, "1"), "tp2": (2, "2"), "dp2": (2, "1")}  # ranks, tensor-parallel size
THREE = ["grpo", "ppo", "dpo"]
# What runs together: a model, a layout, algorithms.
RUNS = [
    ("seeded", "one", [*ONLINE, *OFFLINE]),
    ("seeded", "tp2", THREE),
    ("stories" if SHARED else "seeded", "dp2", THREE),
]

pytestmark = [pytest.mark.learning, pytest.mark.distributed]


def of(kinds: list[str]) -> list[tuple[str, str, str]]:
    return [(model, layout, name) for model, layout, names in RUNS for name in names if name in kinds]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[str, str], dict[str, dict[str, float]]]:
    @functools.cache
    def run(model: str, layout: str) -> dict[str, dict[str, float]]:
        (names,) = (names for *case, names in RUNS if case == [model, layout])
        folder = request.getfixturevalue(f"{model}_model")
        ranks, tp = LAYOUTS[layout]
        out = run_ranks(PROGRAM, ranks, folder, tp, *names, timeout=580)
        found = [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT ")]
        return {result["algorithm"]: result for result in found}

    return run


@pytest.mark.parametrize(("model", "layout", "name"), of(ONLINE))
def test_reward_rises_to_at_least_twice_what_it_was(results, model, layout, name):
    result = results(model, layout)[name]
    assert result["before"] < 0.2
    assert result["after"] > 2 * result["before"], result


@pytest.mark.parametrize(("model", "layout", "name"), of(OFFLINE))
def test_preference_is_learnt_and_holds_on_unseen_prompts(results, model, layout, name):
    result = results(model, layout)[name]
    assert result["loss_after"] < 0.5 * result["loss_before"], result
    assert result["after"] > result["before"] + 1.0, result
    assert result["accuracy_after"] >= 0.9, result
