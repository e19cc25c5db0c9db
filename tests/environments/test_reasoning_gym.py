"""Tasks of the real `reasoning-gym`: `make test-peers`, which installs it."""

from __future__ import annotations

import pytest

from megatron_rl.batch import Prompt
from megatron_rl.config import ConfigError
from megatron_rl.environments import EnvironmentConfig, build_environment
from megatron_rl.environments.reasoning_gym_tasks import ReasoningGymEnvironment

gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is in the environment of make test-peers")

OPTIONS = {"seed": 7, "tasks": {"chain_sum": {"min_terms": 2, "max_terms": 2}}}


def made() -> ReasoningGymEnvironment:
    found = build_environment(EnvironmentConfig(name="reasoning_gym", options=OPTIONS))()
    assert isinstance(found, ReasoningGymEnvironment)
    return found


def test_the_entry_is_that_of_the_rows_number_and_its_own_score_counts() -> None:
    expected = gym.create_dataset("chain_sum", seed=7, size=1_000_000, min_terms=2, max_terms=2)
    for index in (0, 5, 999):
        environment, entry = made(), expected[index]
        assert environment.reset(Prompt([1], text="chain_sum", index=index)).startswith(entry["question"])
        for content, score in (
            (f"I think <answer>1</answer>, no: <answer> {entry['answer']} </answer>", 1.0),
            (entry["answer"], 1.0),
            ("<answer>none</answer>", expected.score_answer("none", entry=entry)),
        ):
            step = environment.step({"role": "assistant", "content": content})
            assert step.done
            assert step.reward == pytest.approx(score)


def test_chat_prompts_name_their_task_too() -> None:
    environment = made()
    prompt = Prompt([1], text="<user>leg_counting", messages=[{"role": "user", "content": "leg_counting"}], index=2)
    entry = gym.create_dataset("leg_counting", seed=7, size=1_000_000)[2]
    assert environment.reset(prompt).startswith(entry["question"])


def test_an_unknown_task_or_option_is_a_mistake_of_the_configuration() -> None:
    for tasks in ({"nonsense": {}}, {"chain_sum": {"min_terms": 9, "max_terms": 2}}):
        with pytest.raises(ConfigError, match="environment reasoning_gym: task"):
            build_environment(EnvironmentConfig(name="reasoning_gym", options={"tasks": tasks}))
