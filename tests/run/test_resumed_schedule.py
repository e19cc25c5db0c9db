"""A resumed run goes on with its own configuration: longer schedules, other learning rates; unchanged ones exactly."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
from small_run import metrics_of, write_run

from megatron_rl.config import load_config
from megatron_rl.run.build import build_trainer
from megatron_rl.run.run_config import RunConfig

PEAK, WARMUP = 3e-3, 1


def cosine(step: int, total: int, peak: float = PEAK) -> float:
    """The learning rate of optimizer step ``step``, counted from 1."""
    if step <= WARMUP:
        return peak * step / WARMUP
    return peak * 0.5 * (math.cos(math.pi * (step - WARMUP) / (total - WARMUP)) + 1)


def train(folder: Path, *overrides: str) -> dict[int, dict[str, float]]:
    build_trainer(load_config(RunConfig, folder / "config.yaml", list(overrides))).train()
    return metrics_of(folder / "out")


def rates(found: dict[int, dict[str, float]], *steps: int) -> list[float]:
    return [found[step]["optimizer/learning_rate"] for step in steps]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(
        tmp_path,
        algorithm={"name": "grpo"},
        reference=None,
        actor={
            "optimizer": {"learning_rate": PEAK, "warmup_steps": WARMUP, "decay": "cosine"},
            "sampling": {"n": 2, "max_tokens": 3},
        },
        prompts_per_step=4,
        trainer={"output_dir": str(tmp_path / "out"), "num_steps": 4, "save_every": 2, "export": False},
    )
    return tmp_path


def test_a_longer_run_decays_over_its_new_length_and_a_changed_rate_counts(folder, caplog):
    first = train(folder)
    assert rates(first, 1, 2, 3, 4) == pytest.approx([cosine(step, 4) for step in (1, 2, 3, 4)], abs=1e-12)
    with caplog.at_level(logging.WARNING):
        longer = train(folder, "trainer.num_steps=6")
    assert rates(longer, 5, 6) == pytest.approx([cosine(step, 6) for step in (5, 6)], abs=1e-12)
    assert "actor: decay_steps 4 -> 6, as this run's configuration says" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        changed = train(
            folder, "trainer.num_steps=8", "actor.optimizer.learning_rate=0.001", "actor.optimizer.beta2=0.9"
        )
    assert rates(changed, 7, 8) == pytest.approx([cosine(step, 8, 1e-3) for step in (7, 8)], abs=1e-12)
    for part in ("learning_rate 0.003 -> 0.001", "decay_steps 6 -> 8", "beta1, beta2 (0.9, 0.95) -> (0.9, 0.9)"):
        assert part in caplog.text
    assert "learning_rate: 0.001" in (folder / "out" / "config.yaml").read_text()


def test_an_unchanged_configuration_resumes_to_the_bit_and_says_nothing(folder, caplog):
    whole = train(folder)
    with caplog.at_level(logging.WARNING):
        resumed = train(
            folder, f"trainer.resume={folder}/out/checkpoints/step_000002", f"trainer.output_dir={folder}/again"
        )
    again = metrics_of(folder / "again")
    assert resumed == whole
    assert set(again) == {3, 4}
    assert all(again[step] == whole[step] for step in (3, 4))
    assert "configuration says" not in caplog.text


def test_other_data_with_as_many_rows_are_refused(folder):
    train(folder, "trainer.num_steps=2")
    rows = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(rows.replace("19+13=", "19+14="))
    with pytest.raises(ValueError, match=r"as many records, but others"):
        train(folder)
