"""Runs that end in the middle and are started again: one step, one line, in every tracker; and nothing is lost that
could be saved. The loop, its checkpoints and trackers are the real ones, around a flow that computes nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.batch import Batch, Prompt
from megatron_rl.dataflow import Flow, Stage
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.parallel.abandon import abandonable
from megatron_rl.tracking import TrackerGroup, build_tracker
from megatron_rl.trainer import TrainerConfig, TrainingLoop
from megatron_rl.trainer.checkpoint import DistributedCheckpoints

STEPS, EVERY = 5, 2


class Source:
    """Counts; its count is what each step tracks."""

    steps_per_epoch = STEPS

    def __init__(self) -> None:
        self.count = 0

    def next_batch(self) -> Batch:
        self.count += 1
        return Batch(prompts=[Prompt([self.count])])

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]


class Job:
    """One output folder, started as often as one likes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = ParallelContext.create(ParallelSizes(), seed=0)

    def start(
        self,
        in_step: Callable[[int], object] = lambda step: None,
        in_evaluation: Callable[[], object] = lambda: None,
        export: Callable[[Path], object] = lambda folder: None,
        **settings: object,
    ) -> int | str | None:
        """How it ended: None = by itself, else the code of SystemExit or the name of another exception."""

        def run(batch: Batch) -> None:
            in_step(batch.prompts[0].token_ids[0])
            batch.metrics["rewards/mean"] = float(batch.prompts[0].token_ids[0])

        def evaluate() -> dict[str, float]:
            in_evaluation()
            return {"eval/reward": 1.0}

        given = {"num_steps": STEPS, "save_every": EVERY, "evaluate_every": EVERY} | settings
        config = TrackerGroup.Config(trackers=("jsonl", "tensorboard", "mlflow"))
        trainer = TrainingLoop(
            Flow((Stage("test.compute", run, reads=("prompts",), place="host", collective=False),)),
            Source(),
            self.context,
            TrainerConfig(output_dir=str(self.folder), **given),
            checkpoints=DistributedCheckpoints(self.folder / "checkpoints", self.context, {}, {}),
            evaluate=evaluate,
            export=export,
            trackers=[build_tracker(config, self.folder)],
        )
        try:
            trainer.train()
        except SystemExit as error:
            return error.code
        except BaseException as error:
            return type(error).__name__
        return None

    @property
    def saved(self) -> int:
        return max((int(path.name[5:]) for path in (self.folder / "checkpoints").glob("step_*")), default=0)

    def check(self, split: int | None = None) -> None:
        """Steps 0 to 5 stand once in each tracker, with evaluations of 0, 2, 4 and 5. ``split``: the step whose
        evaluation came in a later start, and so as a line of its own."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        assert steps == sorted([*range(STEPS + 1), *([] if split is None else [split])])
        assert [(line["step"], line["rewards/mean"]) for line in lines if "rewards/mean" in line] == REWARDS
        assert [line["step"] for line in lines if "eval/reward" in line] == EVALUATED
        for read in (self.in_tensorboard, self.in_mlflow):
            assert read("rewards/mean") == REWARDS
            assert [step for step, _ in read("eval/reward")] == EVALUATED

    def in_tensorboard(self, name: str) -> list[tuple[int, float]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "tensorboard"), purge_orphaned_data=False)
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(name)]

    def in_mlflow(self, name: str) -> list[tuple[int, float]]:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("megatron_rl").experiment_id])
        assert run.info.status == "FINISHED"
        return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))


REWARDS = [(step, float(step)) for step in range(1, STEPS + 1)]
EVALUATED = [0, 2, 4, 5]


class Killed(BaseException):
    """Ends a run at once, as a kill does: nothing is saved."""


def killed(*_: object) -> None:
    raise Killed


def killed_in(wanted: int) -> Callable[[int], object]:
    return lambda step: killed() if step == wanted else None


def told_in(wanted: int, then: Callable[[], object] = lambda: None) -> Callable[[int], object]:
    """SIGTERM in the middle of a step."""

    def in_step(step: int) -> None:
        if step == wanted:
            os.kill(os.getpid(), signal.SIGTERM)
            then()

    return in_step


def hidden_sleep() -> None:
    """Code that lets no Exception pass."""
    for _ in range(100):
        try:
            time.sleep(60)
        except Exception:
            continue


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_a_finished_run_started_again_writes_nothing_twice(job):
    assert [job.start(), job.start(), job.start()] == [None] * 3
    job.check()


def test_a_kill_during_the_export_and_its_rerun(job):
    assert job.start(export=killed) == "Killed"
    exported = []
    assert job.start(export=exported.append) is None
    assert exported == [job.folder / "hf"]
    job.check()


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_a_kill_in_a_step_before_and_after_the_first_checkpoint(step, job):
    assert [job.start(killed_in(step)), job.start(killed_in(step)), job.start()] == ["Killed", "Killed", None]
    job.check()


def test_a_run_told_in_its_last_step_is_evaluated_by_the_next_and_once(job):
    assert job.start(told_in(5)) == 128 + signal.SIGTERM
    assert job.saved == 5
    assert job.start(export=killed) == "Killed"
    assert job.start() is None
    job.check(split=5)


def test_a_run_told_in_a_step_with_an_evaluation_is_evaluated_by_the_next(job):
    assert job.start(told_in(4)) == 128 + signal.SIGTERM
    assert job.saved == 4
    assert job.start() is None
    job.check(split=4)


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_that_does_not_end_is_given_up_in_time_and_trained_again(step, job):
    started = time.monotonic()
    assert job.start(told_in(step, hidden_sleep), grace_seconds=6.0) == 128 + signal.SIGTERM
    assert time.monotonic() - started > 2.5
    assert job.saved == step - 1  # of step 1 there is nothing to save
    assert job.start() is None
    job.check()


def test_an_evaluation_that_does_not_end_is_given_up_and_made_by_the_next_run(job):
    evaluations = iter([lambda: None, lambda: told_in(0, hidden_sleep)(0)])

    def second_is_endless() -> None:
        with abandonable():
            next(evaluations)()

    assert job.start(in_evaluation=second_is_endless, grace_seconds=6.0) == 128 + signal.SIGTERM
    assert job.saved == 2
    assert job.start() is None
    job.check(split=2)
