"""A reward model is trained, exported, loaded by `transformers` and by `RewardModel`: the scores are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import ROOT, write_run
from torchrun import run_torchrun

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).with_name("reward_program.py")
CASES = {"one process, pad of its own": (1, "1", "own"), "tp2, pad is eos": (2, "2", "eos")}


@pytest.fixture(scope="module", params=CASES)
def result(request, tmp_path_factory) -> dict:
    nproc, tp, pad = CASES[request.param]
    folder = tmp_path_factory.mktemp("reward")
    write_run(folder)
    out = run_torchrun(PROGRAM, nproc, str(folder), tp, pad, timeout=300, PYTHONPATH=f"{ROOT}:{ROOT / 'tests' / 'run'}")
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_reward_model_learns_to_tell_chosen_from_rejected(result):
    assert result["first"]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)  # the head starts at zero
    assert result["last"]["rewards/margins"] > 0.5
    assert result["last"]["rewards/accuracies"] > 0.75


def test_exported_classifier_scores_in_transformers_as_in_the_job(result):
    assert max(map(abs, result["theirs"])) > 0.05
    assert result["ours"] == pytest.approx(result["theirs"], abs=1e-5)


def test_training_goes_on_from_an_exported_classifier(result):
    assert result["reloaded"]["rewards/margins"] > 0.5
    assert result["reloaded"]["loss/centering"] > 0.0
