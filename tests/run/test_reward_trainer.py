"""A reward model is trained, exported, loaded by `transformers` and by `RewardModel`: the rewards are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_ranks
from small_run import ROOT, write_run

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).with_name("reward_program.py")
CASES = {
    "one process, pad of its own": (1, "1", "1", "own"),
    "tp2, pad is eos": (2, "2", "1", "eos"),
    "pp2, pad is eos": (2, "1", "2", "eos"),
}


def run(folder: Path, nproc: int, *arguments: str) -> dict:
    write_run(folder)
    own = f"{ROOT}:{ROOT / 'tests' / 'run'}"
    out = run_ranks(PROGRAM, nproc, str(folder), *arguments, timeout=300, PYTHONPATH=own)
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("alone"), *CASES["one process, pad of its own"])


@pytest.fixture(scope="module", params=CASES)
def result(request, alone, tmp_path_factory) -> dict:
    if request.param == next(iter(CASES)):
        return alone
    return run(tmp_path_factory.mktemp("reward"), *CASES[request.param], alone["checkpoint"])


def test_reward_model_learns_to_tell_chosen_from_rejected(result):
    assert result["first"]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)  # the head starts at zero
    assert result["last"]["rewards/margins"] > 0.5
    assert result["last"]["rewards/accuracies"] > 0.75


def test_folder_checkpoint_and_chunks_score_in_the_job_as_the_folder_does_in_transformers(result):
    assert set(result["ours"]) >= {"folder", "checkpoint", "chunks"}
    for way, theirs in result["theirs"].items():
        assert max(map(abs, theirs)) > 0.05
        assert result["ours"][way] == pytest.approx(theirs, abs=1e-5), way


def test_a_checkpoint_scores_alike_in_a_layout_that_did_not_write_it(result, alone):
    if result is not alone:
        assert result["ours"]["another layout"] == pytest.approx(alone["theirs"]["folder"], abs=1e-5)


def test_training_goes_on_from_an_exported_classifier(result):
    assert result["reloaded"]["rewards/margins"] > 0.5
    assert result["reloaded"]["loss/centering"] > 0.0
