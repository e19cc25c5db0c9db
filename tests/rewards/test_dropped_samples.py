"""Samples without a reward leave the batch, and ranks that keep different numbers of them train on together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_ranks
from torchrun import ROOT


@pytest.mark.distributed
def test_data_parallel_ranks_with_different_numbers_of_samples_train_together(
    seeded_model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Once upon a time, there was a girl named {name}."} for name in ("Lily", "Sue", "Amy", "Kate")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows * 4)))
    (tmp_path / "config.yaml").write_text(
        json.dumps(
            {
                "model": str(seeded_model),
                "algorithm": {"name": "grpo", "num_mini_batches": 2, "old_logprobs": "recompute"},
                "actor": {"sampling": {"n": 4, "max_tokens": 12}, "optimizer": {"learning_rate": 1e-4}},
                "data": {"path": str(tmp_path / "prompts.jsonl")},
                "prompts_per_step": 8,
                "shuffle": False,
                "rollout_parts": 2,
                "rewards": [{"name": f"python:{ROOT / 'tests/rewards/dropping_rewards.py'}:sometimes"}],
                "trainer": {"num_steps": 2, "output_dir": str(tmp_path / "out"), "save_at_end": False},
                "tracking": {"trackers": ["jsonl"]},
            }
        )
    )
    run_ranks("-m", 2, "megatron_rl", "train", str(tmp_path / "config.yaml"), timeout=240)
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        assert step["rewards/mean"] > 0
        assert step["optimizer/gradient_norm"] > 0
        assert 0.25 <= step["rewards/dropped_fraction"] < 1  # every fourth prompt, and some others
    assert (tmp_path / "out" / "hf" / "model.safetensors").is_file()
