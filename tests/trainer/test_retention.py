"""The newest checkpoint is the one that was completed last in the course that the run took."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.trainer.restart_point import find_checkpoint
from megatron_rl.trainer.retention import complete_checkpoints, record_newest, record_restored


def completed(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
        record_newest(folder, f"step_{step:06d}")


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in complete_checkpoints(folder)]


def test_a_folder_without_an_order_counts_by_step(tmp_path):
    for step in (10, 2, 4):
        (tmp_path / f"step_{step:06d}").mkdir()
    assert steps(tmp_path) == [2, 4, 10]
    completed(tmp_path, 3)
    assert steps(tmp_path) == [2, 4, 10, 3]


def test_steps_after_the_one_resumed_from_are_the_first_to_go(tmp_path):
    completed(tmp_path, 2, 4, 8, 10)
    record_restored(tmp_path, tmp_path / "step_000004")
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "step_000004"
    completed(tmp_path, 6, 7)
    assert steps(tmp_path) == [8, 10, 2, 4, 6, 7]
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "step_000007"


def test_a_step_written_again_is_new(tmp_path):
    completed(tmp_path, 2, 4, 6)
    completed(tmp_path, 4)
    assert steps(tmp_path) == [2, 6, 4]


def test_resuming_from_another_run_makes_all_of_ones_own_old(tmp_path):
    completed(tmp_path / "own", 8, 10)
    completed(tmp_path / "other", 4)
    record_restored(tmp_path / "own", tmp_path / "other" / "step_000004")
    completed(tmp_path / "own", 6)
    assert steps(tmp_path / "own") == [8, 10, 6]


def test_a_checkpoint_may_be_given_by_its_name(tmp_path):
    completed(tmp_path, 2, 4)
    assert find_checkpoint(tmp_path, "step_000002") == tmp_path / "step_000002"
