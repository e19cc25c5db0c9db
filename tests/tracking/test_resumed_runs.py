"""A step stands once in every tracker, however often the run was killed, resumed and begun anew; each tracker's own
library reads back what was written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.tracking import TrackerGroup, build_tracker

Points = list[tuple[int, float]]


def part_of_a_run(folder: Path, name: str, resume: int | None, steps: range, factor: float, status: str) -> None:
    """``factor`` tells the values of a step that is trained again from those of the first time."""
    if name == "wandb":
        pytest.importorskip("wandb", reason="wandb is an optional extra: pip install 'megatron-rl[wandb]'")
    options = {"wandb": {"mode": "offline"}} if name == "wandb" else {}
    tracker = build_tracker(TrackerGroup.Config(trackers=(name,), options=options), folder)
    tracker.start(resume)
    tracker.log_params({"seed": 1})
    for step in steps:
        tracker.log({"rewards/mean": factor * step, "eval/reward": -factor * step}, step)
    tracker.close(status)
    if name == "wandb":
        wait_for_the_end(max((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime))


def wait_for_the_end(file: Path) -> None:
    """W&B's service writes on after `finish`; a next run is another process's, and later."""
    from megatron_rl.tracking.wandb_file import records

    deadline = time.monotonic() + 60
    while not any(message.WhichOneof("record_type") == "exit" for _, message in records(file)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def in_jsonl(folder: Path) -> Points:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["rewards/mean"]) for line in lines]


def in_tensorboard(folder: Path) -> Points:
    """As a reader sees it that knows nothing of restarts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=False)
    events.Reload()
    if "config/text_summary" in events.Tags()["tensors"]:
        assert len(events.Tensors("config/text_summary")) == 1
    return [(event.step, round(event.value, 6)) for event in events.Scalars("rewards/mean")]


def in_mlflow(folder: Path) -> Points:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("megatron_rl")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params) == ("FINISHED", {"seed": "1"})
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "rewards/mean"))


def in_wandb(folder: Path) -> Points:
    """All that `wandb sync` would send, in its order."""
    from megatron_rl.tracking.wandb_file import records

    found, runs = [], set()
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for _, message in records(file):
            if message.WhichOneof("record_type") == "run":
                runs.add(message.run.run_id)
            if message.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: item.value_json for item in message.history.item}
                found.append((int(items["_step"]), float(items["rewards/mean"])))
    assert len(runs) == 1
    return found


READERS: dict[str, Callable[[Path], Points]] = {
    "jsonl": in_jsonl,
    "tensorboard": in_tensorboard,
    "mlflow": in_mlflow,
    "wandb": in_wandb,
}


@pytest.mark.parametrize("name", sorted(READERS))
def test_steps_trained_again_after_a_kill_stand_once_with_their_new_values(name: str, tmp_path: Path) -> None:
    part_of_a_run(tmp_path, name, None, range(0, 6), 1.0, "killed")
    part_of_a_run(tmp_path, name, 3, range(4, 6), 2.0, "killed")
    part_of_a_run(tmp_path, name, 3, range(4, 8), 3.0, "finished")
    assert READERS[name](tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), *((s, 3.0 * s) for s in range(4, 8))]


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_run_killed_before_its_first_checkpoint_leaves_nothing_to_the_next(name: str, tmp_path: Path) -> None:
    part_of_a_run(tmp_path, name, None, range(0, 3), 1.0, "killed")
    part_of_a_run(tmp_path, name, None, range(0, 3), 2.0, "finished")
    assert READERS[name](tmp_path) == [(0, 0.0), (1, 2.0), (2, 4.0)]


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_finished_run_started_again_adds_nothing(name: str, tmp_path: Path) -> None:
    part_of_a_run(tmp_path, name, None, range(0, 3), 1.0, "finished")
    part_of_a_run(tmp_path, name, 2, range(0), 2.0, "finished")
    assert READERS[name](tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_what_a_torn_event_file_still_holds_is_kept(tmp_path: Path) -> None:
    part_of_a_run(tmp_path, "tensorboard", None, range(0, 4), 1.0, "killed")
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    part_of_a_run(tmp_path, "tensorboard", 2, range(3, 5), 2.0, "finished")
    assert in_tensorboard(tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 6.0), (4, 8.0)]


def test_mlflow_keeps_artifacts_and_tags_of_a_run_that_goes_on_as_another(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    tracker = build_tracker(TrackerGroup.Config(trackers=("mlflow",)), tmp_path)
    tracker.start()
    (tmp_path / "note.txt").write_text("kept")
    tracker.log_artifact(tmp_path / "note.txt", "notes/deep")
    tracker.log({"a": 1.0, "b": float("nan")}, 1)
    tracker.log({"a": 2.0}, 2)
    tracker.close("killed")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    old = (tmp_path / "mlflow_run_id").read_text().strip()
    client.set_tag(old, "owner", "me")
    part_of_a_run(tmp_path, "mlflow", 1, range(2, 3), 5.0, "finished")
    new = (tmp_path / "mlflow_run_id").read_text().strip()
    assert new != old
    run = client.get_run(new)
    assert (run.data.tags["owner"], run.data.tags["megatron_rl.continues"]) == ("me", old)
    assert Path(client.download_artifacts(new, "notes/deep/note.txt")).read_text() == "kept"
    assert [(m.step, m.value) for m in client.get_metric_history(new, "a")] == [(1, 1.0)]
    assert len(client.get_metric_history(new, "b")) == 1
    assert client.get_run(old).info.lifecycle_stage == "deleted"
