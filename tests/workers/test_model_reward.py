"""What a reward model may be made of, and what is refused before it can score."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
from small_run import write_run
from stored_arguments import forget_arguments

from megatron_rl import RewardModel
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.config import ConfigError
from megatron_rl.engines.conversion import convert
from megatron_rl.rewards import RewardError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_run(folder)
    return folder


def batch() -> Batch:
    return Batch(samples=[Sample(Prompt([5, 6], index=0), [7, 8], [0.0, 0.0])])


def test_a_language_model_is_no_reward_model(folder):
    with pytest.raises(RewardError, match="is a language model without a value head"):
        RewardModel(str(folder / "model")).score().run(batch())


def test_neither_is_its_megatron_checkpoint(folder):
    checkpoint = convert(folder / "model", folder / "megatron", "megatron")
    with pytest.raises(RewardError, match="is a language model without a value head"):
        RewardModel(checkpoint).score().run(batch())


def test_a_checkpoint_that_describes_nothing_says_what_to_set(folder):
    checkpoint = convert(folder / "model", folder / "bare", "megatron")
    (checkpoint / "release" / "hf").rename(folder / "elsewhere")
    forget_arguments(checkpoint / "release")
    with pytest.raises(RewardError, match="set model_config_path"):
        RewardModel(checkpoint).score().run(batch())


def test_nothing_is_an_error_that_says_what_may_be_given():
    with pytest.raises(ConfigError, match="None is not a reward: expected a function"):
        RewardModel()
