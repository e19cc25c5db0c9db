"""The code in docs/adding_things.md runs as it is printed."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from small_run import metrics_of, write_run


@pytest.fixture(scope="module")
def extensions(tmp_path_factory):
    """A small run, and beside it the files that the page shows, each under the name in its first line."""
    folder = tmp_path_factory.mktemp("extensions")
    page = (ROOT / "docs" / "adding_things.md").read_text()
    for name, body in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        (folder / name).write_text(body)
    write_run(folder)
    return folder


def test_algorithm_reward_and_callback_of_the_page_train(extensions, command):
    ended = command(
        "train",
        extensions / "config.yaml",
        f"algorithm={{name: 'python:{extensions}/best_half.py:BestHalf', margin: 0.001, num_mini_batches: 2}}",
        f"rewards=[{{name: 'python:{extensions}/my_rewards.py:brevity'}}]",
        f"callbacks=['{extensions}/stop_early.py:StopWhenLong']",
        "trainer.num_steps=2",
    )
    assert ended.code == 0, ended.err
    metrics = metrics_of(extensions / "out")
    assert set(metrics) == {1, 2}
    assert 0.9 < metrics[1]["rewards/mean"] < 1.0  # at most 5 tokens of 100
    assert metrics[1]["loss/best_half"] > 0


def test_a_misspelt_option_of_an_own_algorithm_names_the_right_one(extensions, command):
    algorithm = f"algorithm={{name: 'python:{extensions}/best_half.py:BestHalf', margn: 0.1}}"
    assert "did you mean 'margin'" in command("train", extensions / "config.yaml", algorithm).error
