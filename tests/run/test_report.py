"""Pictures of a run: which there are, and that trackers get each."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rl.run.report import RewardCurve
from megatron_rl.tracking import TrackedRun, Tracker


class Kept(Tracker):
    """Knows the names of what it was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(TrackedRun(folder))
        self.names: list[str] = []

    def log_artifact(self, path: Path) -> None:
        assert path.read_bytes().startswith(b"\x89PNG")
        self.names.append(path.name)


@pytest.mark.parametrize(
    ("metric", "pictures"),
    [
        ("rewards/mean", ["reward_curve.png", "training_curve.png"]),
        ("rewards/accuracies", ["training_curve.png"]),
        ("loss/total", ["training_curve.png"]),
        ("time/step_s", []),
    ],
)
def test_pictures_of_what_a_run_has(tmp_path: Path, metric: str, pictures: list[str]) -> None:
    lines = [{"step": step, metric: 0.1 * step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tracker = Kept(tmp_path)
    RewardCurve(tmp_path, tracker).on_train_end(SimpleNamespace(context=SimpleNamespace(rank=0)))
    assert tracker.names == pictures
    assert sorted(path.name for path in tmp_path.glob("*.png")) == pictures
