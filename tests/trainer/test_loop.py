"""The loop and its config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_alone

from megatron_rl.trainer import TrainerConfig


@pytest.mark.parametrize(
    ("config", "steps"),
    [({"num_steps": 0}, 0), ({"num_steps": 7}, 7), ({"num_epochs": 1.5}, 15), ({"num_epochs": 0.01}, 1)],
)
def test_length_of_a_run_is_given_in_steps_or_in_passes_over_the_data(config, steps):
    assert TrainerConfig(**config).total_steps(steps_per_epoch=10) == steps


def test_a_checkpoint_written_in_the_background_is_completed_while_training_goes_on(tmp_path):
    program = Path(__file__).with_name("async_save_program.py")
    result = json.loads(run_alone(program, tmp_path, timeout=200).splitlines()[-1])
    assert result["seen_at"] > 1
    assert result["left"] == ["step_000001"]
