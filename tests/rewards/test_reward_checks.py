"""What a reward returns is checked once; every mistake names its sample."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.batch import Prompt, Sample
from megatron_rl.config import ConfigError
from megatron_rl.rewards import (
    REWARDS,
    SERVICES,
    ExactReward,
    FunctionReward,
    Reward,
    RewardConfig,
    RewardError,
    WeightedReward,
    as_reward,
    build_reward,
)


def samples(*texts: str, answer: object = "7") -> list[Sample]:
    prompts = [Prompt([1], text=f"question {i}", answer=answer, index=10 + i) for i in range(len(texts))]
    return [Sample(p, [2], [0.0], response_text=text) for p, text in zip(prompts, texts, strict=True)]


def length(sample: Sample) -> float:
    return len(sample.response_text)


def test_function_scores_each_sample_and_leaves_its_part_on_it() -> None:
    batch = samples("a", "bbb")
    assert FunctionReward(length)(batch) == [1.0, 3.0]
    assert [s.reward_parts for s in batch] == [{"length": 1.0}, {"length": 3.0}]
    assert [s.reward for s in batch] == [None, None]  # the reward stage sets it


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_batched_function_may_return_a_list_or_an_array(kind: type) -> None:
    reward = as_reward(lambda batch: kind([0.5 * len(s.response_text) for s in batch]), name="half", batched=True)
    assert reward(samples("a", "bb")) == [0.5, 1.0]


@pytest.mark.parametrize("value", [True, 1, 1.0, np.float32(1), torch.tensor(1.0), np.array(1)])
def test_anything_that_is_one_number_is_accepted(value: object) -> None:
    (score,) = FunctionReward(lambda sample: value, name="one")(samples("a"))
    assert score == 1.0
    assert type(score) is float


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, "returned nan, expected a finite number"),
        (-math.inf, "returned -inf, expected a finite number"),
        (torch.tensor(math.nan), "returned nan"),
        (None, "returned NoneType 'None', expected one number"),
        ("1.0", "returned str"),
        ([1.0], "returned list '[1.0]', expected one number"),
        (torch.ones(2), "returned Tensor"),
        (1j, "returned complex"),
    ],
)
def test_a_bad_value_names_the_sample(value: object, expected: str) -> None:
    reward = FunctionReward(lambda sample: value if sample.response_text == "bad" else 0.0, name="mine")
    with pytest.raises(RewardError) as caught:
        reward(samples("good", "bad"))
    assert expected in str(caught.value)
    assert "prompt 11 'question 1', response 'bad'" in str(caught.value)


@pytest.mark.parametrize("value", [[1.0], [1.0] * 3, 1.0, None, "ab", torch.ones(2, 2), torch.tensor(1.0)])
def test_a_batched_function_of_the_wrong_shape_is_an_error(value: object) -> None:
    with pytest.raises(RewardError, match=r"'mine' returned"):
        FunctionReward(lambda batch: value, name="mine", batched=True)(samples("a", "b"))


def test_an_exception_names_the_sample_and_keeps_its_cause() -> None:
    with pytest.raises(RewardError, match=r"'mine' raised ZeroDivisionError: .*prompt 10 .*response 'a'") as caught:
        FunctionReward(lambda sample: 1 / 0, name="mine")(samples("a"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RewardError, match=r"ZeroDivisionError: .* scoring 2 samples, the first of them prompt 10"):
        FunctionReward(lambda batch: 1 / 0, name="mine", batched=True)(samples("a", "b"))


def test_long_texts_are_cut_in_messages() -> None:
    with pytest.raises(RewardError) as caught:
        FunctionReward(lambda sample: math.nan)(samples("x" * 10_000))
    assert len(str(caught.value)) < 300


def test_no_samples_need_no_reward() -> None:
    assert FunctionReward(lambda batch: 1 / 0, batched=True)([]) == []


def test_weighted_sum_keeps_each_part_before_weighting() -> None:
    batch = samples("7", "77")
    reward = as_reward({"correct": ExactReward(), "long": (length, -0.5)})
    assert reward(batch) == [1.0 - 0.5, 0.0 - 1.0]
    assert [s.reward_parts for s in batch] == [{"correct": 1.0, "long": 1.0}, {"correct": 0.0, "long": 2.0}]


def test_weighted_sum_does_not_depend_on_the_order_of_its_parts() -> None:
    parts = {f"r{i}": (FunctionReward(lambda s, v=v: v), 1.0) for i, v in enumerate([1e16, 1.0, -1e16])}
    assert WeightedReward(parts)(samples("a")) == [1.0]
    assert WeightedReward(dict(reversed(parts.items())))(samples("a")) == [1.0]


def test_configuration_makes_the_same_rewards(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def brevity(sample):\n    return -len(sample.response_text)\n")
    configs = [
        RewardConfig(name="number"),
        RewardConfig(name="regex", weight=0.5, label="digits", options={"pattern": r"\d+"}),
        RewardConfig(name=f"python:{tmp_path}/mine.py:brevity", weight=0.01),
    ]
    batch = samples("It is 7")
    assert build_reward(configs)(batch) == [1.0 + 0.5 - 0.07]
    assert batch[0].reward_parts == {"number": 1.0, "digits": 1.0, "brevity": -7.0}
    assert isinstance(build_reward(configs[:1]), Reward)
    assert build_reward([RewardConfig(name="exact", weight=2.0)])(samples("7")) == [2.0]


def test_user_code_may_be_batched_or_a_reward_class(tmp_path: Path) -> None:
    (tmp_path / "kinds.py").write_text(
        "from megatron_rl.rewards import Reward\n"
        "def ranks(samples):\n    return list(range(len(samples)))\n"
        "class Constant(Reward):\n"
        "    name = 'constant'\n"
        "    def __init__(self, value=1.0):\n        self.value = value\n"
        "    def score_one(self, sample):\n        return self.value\n"
    )
    ranks = RewardConfig(name=f"python:{tmp_path}/kinds.py:ranks", options={"batched": True})
    constant = RewardConfig(name=f"python:{tmp_path}/kinds.py:Constant", options={"value": 3.0}, label="three")
    batch = samples("a", "b")
    assert build_reward([ranks])(batch) == [0.0, 1.0]
    assert build_reward([constant])(batch) == [3.0, 3.0]
    assert batch[1].reward_parts == {"ranks": 1.0, "three": 3.0}


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([], "rewards is empty"),
        ([{"name": "exakt"}], "unknown reward 'exakt'. Did you mean 'exact'?"),
        ([{"name": "number", "options": {"tolerence": 1}}], "unknown key 'tolerence'; did you mean 'tolerance'"),
        ([{"name": "regex"}], "'pattern' is required"),
        ([{"name": "regex", "options": {"pattern": "("}}], "is not a regular expression"),
        ([{"name": "regex", "options": {"pattern": "x", "compare": True}}], "compare needs a group"),
        ([{"name": "exact"}, {"name": "exact"}], "two rewards are called 'exact'"),
        ([{"name": "exact", "weight": math.nan}], "weight = nan: expected a finite number"),
        ([{"name": "python:no_such_module_here:f"}], "no module 'no_such_module_here'"),
        ([{"name": "python:math:gcd", "options": {"scale": 2}}], "only the option batched, not 'scale'"),
        ([{"name": "python:math:pi"}], "3.14159"),
    ],
)
def test_bad_configuration_is_one_clear_error(configs: list[dict], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_reward([RewardConfig(**config) for config in configs])
    assert expected in str(caught.value)


def test_every_registered_reward_builds_from_its_name() -> None:
    assert set(REWARDS) - {"model"} == {"environment", "exact", "number", "regex", "math", *SERVICES}
    for name in ("exact", "number", "math"):
        assert as_reward(name).name == name


def test_a_thousand_samples_cost_milliseconds() -> None:
    batch = samples(*["the answer is 7"] * 1000)
    started = time.perf_counter()
    assert sum(as_reward("number")(batch)) == 1000
    assert time.perf_counter() - started < 2
