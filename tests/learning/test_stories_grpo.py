"""GRPO teaches a real pretrained Llama to keep to its hero: examples/stories_grpo, with fewer steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from forked import run_ranks

pytestmark = [pytest.mark.learning, pytest.mark.distributed]
EXAMPLE = ROOT / "examples" / "stories_grpo"
NUM_STEPS = 10


@pytest.fixture(scope="module")
def metrics(stories_model, tmp_path_factory) -> list[dict[str, float]]:
    """A line of metrics a step, of a run on two tensor-parallel ranks."""
    folder: Path = tmp_path_factory.mktemp("stories")
    subprocess.run([sys.executable, str(EXAMPLE / "stories.py"), str(folder)], check=True, timeout=60)
    overrides = {
        "model": stories_model,
        "data.path": folder / "train.jsonl",
        "evaluation.data.path": folder / "heldout.jsonl",
        "rewards": f"[{{name: 'python:{EXAMPLE}/stories.py:names_hero_twice', label: names_hero_twice}}]",
        "parallel.tp": 2,
        "trainer.output_dir": folder / "run",
        "trainer.num_steps": NUM_STEPS,
        "trainer.evaluate_every": 0,
        "trainer.save_at_end": "false",
        "actor.optimizer.learning_rate": 2e-4,
    }
    pairs = [f"{key}={value}" for key, value in overrides.items()]
    run_ranks("-m", 2, "megatron_rl", "train", str(EXAMPLE / "config.yaml"), *pairs, timeout=580)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_training_reward_rises(metrics):
    rewards = [line["rewards/mean"] for line in metrics if "rewards/mean" in line]
    assert len(rewards) == NUM_STEPS
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.25, rewards


def test_it_also_keeps_to_heroes_that_training_has_not_seen(metrics):
    before, after = [line["eval/reward"] for line in metrics if "eval/reward" in line]
    assert after > before + 0.15, (before, after)
