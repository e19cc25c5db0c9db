"""Answers as records and lists: understood, or refused before the run; never compared as Python source."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from megatron_rl.batch import Prompt, Sample
from megatron_rl.config import ConfigError
from megatron_rl.rewards import (
    ExactReward,
    MathReward,
    NumberReward,
    RegexReward,
    Reward,
    RewardError,
    WeightedReward,
    as_reward,
    check_answers,
)
from megatron_rl.rewards.service.template import fill

UNDERSTOOD: list[Any] = [
    {"ground_truth": "18"},
    {"ground_truth": 18, "style": "rule", "split": 5},
    {"ground_truth": ["18"]},
    {"answer": "18"},
    ["18"],
    [18],
    np.array(["18"], dtype=object),
    np.int64(18),
    '{"ground_truth": "18", "index": 7}',
    '["18"]',
]
REFUSED: list[Any] = [
    {"value": "18", "unit": 7},
    {},
    ["17", "18"],
    [],
    {"ground_truth": {"target": 18, "numbers": [9, 2]}},
    '["17", "18"]',
    float("nan"),
    pytest.param(object(), id="an object"),
]
REWARDS = [ExactReward(), NumberReward(), MathReward(), RegexReward(RegexReward.Config(pattern=r"(\d+)", compare=True))]


def sample(response: str, answer: Any) -> Sample:
    return Sample(Prompt([1], answer=answer, index=3), [2], [0.0], response_text=response)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.name)
@pytest.mark.parametrize("answer", UNDERSTOOD, ids=repr)
def test_a_wrapped_answer_is_the_answer(reward: Reward, answer: Any) -> None:
    reward.check_answer(answer)
    assert reward([sample(r, answer) for r in ("18", "5", "7")]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.name)
@pytest.mark.parametrize("answer", [*REFUSED, None, " "], ids=repr)
def test_an_answer_that_means_several_things_is_refused_before_the_run_and_when_scoring(
    reward: Reward, answer: Any
) -> None:
    prompts = [Prompt([1], answer="18"), Prompt([1], answer=answer, index=3)]
    weighted = WeightedReward({"own": (as_reward(lambda sample: 1.0), 1.0), reward.name: (reward, 1.0)})
    for checked in (reward, weighted):
        with pytest.raises(ConfigError, match=r"row 3 of the data: .*(data\.answer|expected text)"):
            check_answers(checked, prompts)
    with pytest.raises(RewardError, match="prompt 3"):
        reward([sample("18", answer)])


def test_number_refuses_answers_without_a_number_before_the_run() -> None:
    with pytest.raises(
        ConfigError, match="row 0 of the data: reward 'number' compares numbers, and the answer 'seven'"
    ):
        check_answers(NumberReward(), [Prompt([1], answer="seven")])


def test_an_interval_or_a_set_stays_text() -> None:
    assert ExactReward()([sample("[1, 2]", "[1, 2]"), sample("{1}", "{1}")]) == [1.0, 1.0]


def test_rewards_that_compare_nothing_take_any_answer() -> None:
    any_answers = [Prompt([1], answer=answer) for answer in (None, *REFUSED)]
    check_answers(as_reward(lambda sample: 1.0), any_answers)
    check_answers(RegexReward(RegexReward.Config(pattern="x")), any_answers)


def test_a_service_reads_the_answer_itself_or_json() -> None:
    assert fill("{answer}", sample("", {"ground_truth": "18", "style": "rule"})) == "18"
    assert json.loads(fill("{answer}", sample("", {"numbers": [1, 2]}))) == {"numbers": [1, 2]}
    assert fill("{answer}", sample("", None)) == ""
