"""Trainers in one call: they run, learn, and leave a Hugging Face folder; wrong options and data are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_alone
from small_run import environment, write_run

PROGRAM = Path(__file__).with_name("trainers_program.py")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("trainers")
    write_run(folder)
    out = run_alone(PROGRAM, folder, timeout=400, PYTHONPATH=environment()["PYTHONPATH"])
    return json.loads(out.splitlines()[-1])


def test_dpo_learns_to_prefer_and_exports(result):
    assert result["dpo"]["first"]["rewards/accuracies"] < result["dpo"]["last"]["rewards/accuracies"]
    assert result["dpo"]["last"]["rewards/margins"] > 0.5
    assert result["dpo"]["exported"] == 1


def test_sft_lowers_its_loss(result):
    assert result["sft"]["last"]["loss/total"] < 0.8 * result["sft"]["first"]["loss/total"]


def test_kto_separates_desirable_from_undesirable(result):
    assert result["kto"]["last"]["loss/total"] < result["kto"]["first"]["loss/total"]


def test_grpo_and_ppo_raise_the_reward(result):
    for name in ("grpo", "ppo", "ppo_shared"):
        assert result[name]["last"]["rewards/mean"] > result[name]["first"]["rewards/mean"] + 0.1, name


def test_episodes_of_many_turns_raise_the_environments_reward(result):
    found = result["grpo_episodes"]
    assert found["last"]["rewards/mean"] > found["first"]["rewards/mean"] + 0.1
    assert found["first"]["rewards/mean"] == pytest.approx(found["first"]["environment/reward_mean"])
    assert 1 < found["first"]["environment/turns_mean"] <= 2
    assert 1 <= found["last"]["eval/environment/turns_mean"] <= 2


def test_a_reward_and_an_environment_are_added(result):
    first = result["ppo_episodes"]["first"]
    assert first["environment/turns_mean"] == 1
    assert first["environment/reward_mean"] > 0
    assert first["rewards/mean"] == pytest.approx(1 + first["environment/reward_mean"])


def test_a_wrong_environment_is_named_before_any_model_is_loaded(result):
    errors = result["errors"]
    assert "GRPOTrainer: without reward and environment there is nothing to learn from" in errors["no_reward"]
    assert "chat template" in errors["no_template"]
    assert "expected one of" in errors["instance"]
    assert "a subclass of Environment" in errors["instance"]
    assert "gives 3, expected an Environment" in errors["other"]
    assert "did you mean 'max_turns'?" in errors["key"]


def test_an_unknown_option_names_the_nearest(result):
    assert "unknown option 'betta'. Did you mean 'beta'?" in result["errors"]["option"]


def test_a_data_set_without_the_columns_is_named(result):
    assert "chosen" in result["errors"]["columns"]


def test_kto_refuses_batches_in_which_no_responses_can_be_exchanged(result):
    assert "per_device_train_batch_size = 1, but the KL is estimated" in result["errors"]["kto_batch"]
    assert "rows of eval_dataset a replica = 1" in result["errors"]["kto_eval"]


def test_a_precomputed_reference_is_refused_in_favour_of_the_cache(result):
    assert "Give reference_cache=FOLDER instead" in result["errors"]["precomputed"]
