"""Evaluation of GRPO and PPO on held-out prompts: it shows learning, repeats itself, and leaves training as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_alone
from small_run import environment, write_run

PROGRAM = Path(__file__).with_name("evaluation_program.py")
WAYS = ("GRPOTrainer", "PPOTrainer", "yaml")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("evaluation")
    write_run(folder)
    out = run_alone(PROGRAM, folder, timeout=400, PYTHONPATH=environment()["PYTHONPATH"])
    return json.loads(out.splitlines()[-1])


def evaluations(run: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {step: {k: v for k, v in m.items() if k.startswith("eval/")} for step, m in run.items()}
    return {step: metrics for step, metrics in found.items() if metrics}


@pytest.mark.parametrize("way", WAYS)
def test_reward_on_held_out_prompts_is_measured_before_within_and_after_training_and_rises(results, way):
    found = evaluations(results[way])
    assert list(found) == ["0", "2", "4", "6"]
    assert {metrics["eval/num_prompts"] for metrics in found.values()} == {16.0}
    assert found["6"]["eval/reward"] > found["0"]["eval/reward"] + 0.1
    assert 1.0 <= found["6"]["eval/response_tokens_mean"] <= 5.0


@pytest.mark.parametrize("way", WAYS)
def test_the_same_weights_are_given_the_same_evaluation(results, way):
    found = list(evaluations(results[f"{way} still"]).values())
    assert len(found) == 4
    assert all(metrics == found[0] for metrics in found)
    assert found[0] == evaluations(results[way])["0"]


@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_with_evaluation_and_without(results, way):
    trained = {
        step: {k: v for k, v in metrics.items() if not k.startswith(("eval/", "weight_sync/"))}
        for step, metrics in results[way].items()
    }
    alone = {
        step: {k: v for k, v in metrics.items() if not k.startswith("weight_sync/")}
        for step, metrics in results[f"{way} alone"].items()
    }
    assert {step: trained[step] for step in alone} == alone
    assert len(alone) == 6
    assert alone["6"]["rewards/mean"] > 0


def test_a_run_that_starts_from_another_s_checkpoint_is_as_good_as_that_was_at_its_end(results):
    assert evaluations(results["from the checkpoint"])["0"] == evaluations(results["yaml"])["6"]
