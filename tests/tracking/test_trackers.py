"""Console, metrics.jsonl, TensorBoard, the group that joins them, and the reward curve."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from pathlib import Path

import pytest

from megatron_rl.config import ConfigError
from megatron_rl.tracking import TRACKERS, TrackedRun, TrackerGroup, build_tracker, plot_reward_curve, read_metrics
from megatron_rl.tracking.console import ConsoleTracker
from megatron_rl.tracking.jsonl import JsonlTracker
from megatron_rl.tracking.plot import smooth
from megatron_rl.tracking.tracker import Tracker, flatten


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_jsonl_reads_back_every_bit(tmp_path: Path) -> None:
    tracker = JsonlTracker(TrackedRun(tmp_path))
    tracker.start()
    values = {"a/third": 1 / 3, "a/tiny": 5e-324, "a/nan": math.nan, "a/inf": -math.inf, "a/int": 7}
    tracker.log(values, step=1)
    tracker.log({"eval/reward": 0.1 + 0.2}, step=1)
    read = read_metrics(tracker.path)  # before close: each line is there when log returns
    assert list(read) == [1]
    assert math.isnan(read[1].pop("a/nan"))
    del values["a/nan"]
    assert read[1] == values | {"eval/reward": 0.1 + 0.2}
    json.loads(tracker.path.read_text().splitlines()[0], parse_constant=lambda name: pytest.fail(f"not strict: {name}"))
    tracker.close()


def test_jsonl_of_a_resumed_run_equals_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(folder: Path, first: int, last: int, resume_step: int | None) -> None:
        tracker = JsonlTracker(TrackedRun(folder))
        tracker.start(resume_step)
        for step in range(first, last + 1):
            tracker.log({"reward/mean": step / 7}, step)
        tracker.close()

    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    run(tmp_path / "whole", 1, 10, None)
    run(tmp_path / "cut", 1, 8, None)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "rewar')  # the kill came in the middle of a line
    assert list(read_metrics(tmp_path / "cut" / "metrics.jsonl")) == list(range(1, 9))
    run(tmp_path / "cut", 6, 10, 5)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_jsonl_of_a_new_run_starts_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    tracker = JsonlTracker(TrackedRun(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text()  # nothing is lost before it is known that the run starts anew
    tracker.start()
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_console_writes_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(TrackedRun(tmp_path, total_steps=200), stream=stream)
    tracker.log({"time/step_s": 1.3061, "reward/mean": 0.41234, "loss/policy": -0.0031, "tokens/n": 5.0}, step=12)
    tracker.log({"eval/reward": 0.5}, step=12)
    tracker.log({"other/x": 1e-9}, step=13)
    assert stream.getvalue().splitlines() == [
        "step  12/200 | reward/mean 0.4123 | loss/policy -0.0031 | time/step_s 1.306",
        "step  12/200 | eval/reward 0.5",
        "step  13/200 | other/x 1e-09",
    ]


def test_console_shows_every_nth_step_and_every_evaluation(tmp_path: Path) -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(TrackedRun(tmp_path), ConsoleTracker.Config(every=5), stream=stream)
    for step in range(1, 11):
        tracker.log({"reward/mean": 0.5}, step)
    tracker.log({"eval/reward": 0.5}, 11)
    assert [line.split(" | ")[0] for line in stream.getvalue().splitlines()] == ["step 5", "step 10", "step 11"]


def test_console_draws_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    tracker = ConsoleTracker(TrackedRun(tmp_path, name="arithmetic", total_steps=4), stream=stream)
    tracker.start(resume_step=1)
    for step in (2, 3, 4):
        tracker.log({"reward/mean": 0.25 * step}, step)
    tracker.close()
    assert "arithmetic" in stream.getvalue()
    assert "4/4" in stream.getvalue()
    assert "reward/mean 0.75" in stream.getvalue()


def test_tensorboard_events_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackerGroup.Config(trackers=("tensorboard",))
    tracker = build_tracker(config, tmp_path)
    tracker.start()
    tracker.log_params({"parallel": {"tp": 2}})
    for step in (1, 2, 3):
        tracker.log({"reward/mean": step / 4}, step)
    tracker.close()
    resumed = build_tracker(config, tmp_path)
    resumed.start(resume_step=2)
    resumed.log({"reward/mean": 9.0}, 3)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5), (3, 9.0)]
    assert "parallel.tp" in str(events.Tensors("config/text_summary")[0].tensor_proto)


def test_only_rank_0_writes_anything(tmp_path: Path) -> None:
    group = build_tracker(TrackerGroup.Config(trackers=("jsonl", "tensorboard")), tmp_path / "out", rank=1)
    group.start()
    group.log({"a/b": 1.0}, 1)
    group.close()
    assert group.trackers == []
    assert not (tmp_path / "out").exists()


def test_group_flattens_parameters_and_closes_once(tmp_path: Path) -> None:
    class Spy(Tracker):
        def __init__(self, run: TrackedRun) -> None:
            super().__init__(run)
            self.calls: list[object] = []

        def log_params(self, params: object) -> None:
            self.calls.append(params)

        def close(self, status: str = "finished") -> None:
            self.calls.append(status)

    spy = Spy(TrackedRun(tmp_path))
    group = TrackerGroup(spy.run, [spy])
    group.log_params({"parallel": {"tp": 2, "deep": {"x": [1]}}, "empty": {}, "seed": 1})
    group.close("failed")
    group.close()
    assert spy.calls == [{"parallel.tp": 2, "parallel.deep.x": [1], "empty": {}, "seed": 1}, "failed"]
    assert flatten({}) == {}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"trackers": ("mlfow",)}, "unknown tracker 'mlfow'. Did you mean 'mlflow'?"),
        ({"trackers": ("console",), "options": {"console": {"evry": 2}}}, "unknown key 'evry'; did you mean 'every'"),
        ({"trackers": ("console",), "options": {"wandb": {}}}, "'wandb', which is not in tracking.trackers"),
    ],
)
def test_mistakes_stop_every_rank(tmp_path: Path, rank: int, config: dict, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_tracker(TrackerGroup.Config(**config), tmp_path / "out", rank=rank)
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_absent_package_is_an_error_that_says_how_to_install_it(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(ConfigError, match=r"pip install 'megatron-rl\[wandb\]'"):
        build_tracker(TrackerGroup.Config(trackers=("wandb",)), tmp_path, rank=rank)


def test_wandb_offline_run_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is an optional extra: pip install 'megatron-rl[wandb]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = TrackerGroup.Config(trackers=("wandb",), options={"wandb": {"mode": "offline"}})
    tracker = build_tracker(config, tmp_path)
    tracker.start()
    tracker.log_params({"seed": 1})
    tracker.log({"reward/mean": 0.5}, 1)
    tracker.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_every_registered_tracker_has_options_of_its_own() -> None:
    assert set(TRACKERS) == {"console", "jsonl", "mlflow", "tensorboard", "wandb"}
    for name in TRACKERS:
        assert TRACKERS[name].Config.parse({}) is not None


def test_reward_curve_is_a_picture_with_both_series(tmp_path: Path) -> None:
    metrics = {step: {"reward/mean": 0.3 + 0.01 * step} for step in range(1, 31)}
    metrics[30]["eval/reward"] = 0.6
    plot_reward_curve(metrics, tmp_path / "deep" / "reward.png")
    png = (tmp_path / "deep" / "reward.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    plot_reward_curve({s: {"reward/mean": v["reward/mean"]} for s, v in metrics.items()}, tmp_path / "train.png")
    assert (tmp_path / "train.png").read_bytes() != png  # the evaluation points are really drawn


def test_reward_curve_without_rewards_is_an_error_that_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is among loss/policy"):
        plot_reward_curve({1: {"loss/policy": 1.0}}, tmp_path / "reward.png")


def test_smoothing_of_a_constant_is_that_constant() -> None:
    assert smooth([0.7] * 20) == pytest.approx([0.7] * 20, abs=1e-12)
    assert smooth([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])
