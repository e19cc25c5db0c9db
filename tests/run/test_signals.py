"""A run that is told to stop saves its last step, on every rank the same, and says KILLED."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from forked import Ended, run_forked, run_ranks
from forked_torchrun import run_forked_torchrun
from small_run import PROGRAM, ROOT, environment, metrics_of, write_run
from test_resume import uninterrupted  # noqa: F401  (a fixture)

pytestmark = pytest.mark.distributed

CALLBACK = """
import os, signal
from megatron_rl.trainer import Callback

class Tell(Callback):
    \"\"\"Sends a signal to one rank in the middle of a step. $TELL: rank, steps done before, name of the signal.\"\"\"

    def on_step_begin(self, trainer, batch):
        rank, step, name = os.environ.get("TELL", "-1 -1 none").split()
        if trainer.context.rank == int(rank) and trainer.step == int(step):
            os.kill(os.getpid(), getattr(signal, name))
"""
SMALL = f"{ROOT}/tests/run/small_run.py"
TRACKING = {"trackers": ["jsonl", "mlflow"]}


def torchrun(config: Path, *overrides: str, **env: str) -> Ended:
    arguments = ("--standalone", "--nproc-per-node", 2, PROGRAM, config, "parallel.tp=2", *overrides)
    return run_forked_torchrun(*arguments, PYTHONPATH=environment()["PYTHONPATH"], **env)


def run_again(config: Path) -> None:
    """The same command, with nothing in its way."""
    run_ranks(PROGRAM, 2, config, "parallel.tp=2", PYTHONPATH=environment()["PYTHONPATH"])


def statuses(folder: Path) -> list[str]:
    """Of the runs in MLflow's store, read without MLflow, whose import costs three CPU-seconds."""
    with contextlib.closing(sqlite3.connect(folder / "out" / "mlflow.db")) as database:
        return [status for (status,) in database.execute("select status from runs")]


def test_all_ranks_stop_after_the_step_in_which_one_was_told_and_the_rerun_is_exact(tmp_path, uninterrupted):  # noqa: F811
    """Rank 1 alone is told, in the middle of step 4."""
    (tmp_path / "tell.py").write_text(CALLBACK)
    config = write_run(tmp_path, callbacks=[f"{tmp_path}/tell.py:Tell"], tracking=TRACKING)
    stopped = torchrun(config, TELL="1 3 SIGTERM")
    assert stopped.code != 0
    assert "stopped by signal 15 after step 4" in stopped.err
    assert stopped.err.count("exitcode  : 143") >= 1, stopped.err[-3000:]
    assert (tmp_path / "out" / "checkpoints" / "step_000004" / ".metadata").is_file()
    assert statuses(tmp_path) == ["KILLED"]
    run_again(config)
    assert metrics_of(tmp_path / "out") == uninterrupted[1]
    assert statuses(tmp_path) == ["FINISHED"]


@pytest.mark.parametrize("slow", ["reward", "sampling"])
def test_a_step_longer_than_the_grace_is_given_up_and_the_state_before_it_saved(slow, tmp_path, uninterrupted):  # noqa: F811
    """The reward of step 4 never ends (and hides its exceptions), or one rank's engine never answers. SIGTERM goes to
    torchrun, as Slurm sends it."""
    rewards = [{"name": f"python:{SMALL}:slow_digits"}]
    config = write_run(tmp_path, callbacks=[f"{SMALL}:SlowFrom"], tracking=TRACKING, rewards=rewards)
    stopped = torchrun(config, "trainer.grace_seconds=24", SLOW=str(tmp_path / "slow"), SLOW_WHAT=slow)
    assert time.time() - (tmp_path / "slow.told").stat().st_mtime < 29
    assert stopped.code != 0
    said = "stopped by signal 15 after step 3; the same command continues from there"
    assert stopped.err.count(said) == 2, stopped.err[-4000:]
    assert (tmp_path / "out" / "checkpoints" / "step_000003" / ".metadata").is_file()
    assert statuses(tmp_path) == ["KILLED"]
    run_again(config)
    names = {f"reward_parts/{name}/mean" for name in ("digits", "slow_digits")}
    assert without(metrics_of(tmp_path / "out"), names) == without(uninterrupted[1], names)


def without(metrics: dict[int, dict[str, float]], names: set[str]) -> dict[int, dict[str, float]]:
    return {step: {n: v for n, v in values.items() if n not in names} for step, values in metrics.items()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_the_command_ends_with_the_code_of_its_signal(number, code, tmp_path):
    """One process, without torchrun."""
    (tmp_path / "tell.py").write_text(CALLBACK)
    config = write_run(tmp_path, callbacks=[f"{tmp_path}/tell.py:Tell"])
    paths = environment()["PYTHONPATH"]
    ended = run_forked("-m", "megatron_rl", "train", config, TELL=f"0 1 {number.name}", PYTHONPATH=paths)
    assert ended.code == code, ended.err[-3000:]
    assert f"stopped by signal {int(number)} after step 2" in ended.err
    assert "Traceback" not in ended.err
    assert (tmp_path / "out" / "checkpoints" / "step_000002").is_dir()


GIVEN_UP = """
import os, signal, sys, time
import torch.distributed as dist
from megatron_rl.parallel.abandon import Abandoned, abandonable, overdue
from megatron_rl.trainer.interruption import Interruption
interruption = Interruption(4.0, lambda: print("expired", flush=True), lost=lambda: "lost: all")
with interruption.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    started = time.monotonic()
    time.sleep(2.5)  # longer than its share, and not abandonable
    assert overdue() == signal.SIGTERM
    try:
        with abandonable():
            print("entered", flush=True)
    except Abandoned as abandoned:
        assert abandoned.signal == signal.SIGTERM
    with abandonable(allowed=False):
        time.sleep(0.6)
    print("alive", flush=True)
assert overdue() == 0
with abandonable():
    pass
"""


def test_nothing_but_what_is_abandonable_is_given_up_and_that_at_once_when_the_time_is_over(tmp_path):
    (tmp_path / "program.py").write_text(GIVEN_UP)
    ended = run_forked(tmp_path / "program.py", timeout=120)
    assert (ended.code, ended.out) == (0, "alive\n"), ended.err


ENDLESS = """
import os, signal, time
from megatron_rl.trainer.interruption import Interruption
interruption = Interruption(0.2, lambda: print("closed", flush=True))
with interruption.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_run_that_does_not_stop_in_its_grace_is_ended_with_its_trackers_closed(tmp_path):
    (tmp_path / "program.py").write_text(ENDLESS)
    started = time.monotonic()
    ended = run_forked(tmp_path / "program.py", timeout=120)
    assert (ended.code, ended.out) == (128 + signal.SIGTERM, "closed\n"), ended.err
    assert time.monotonic() - started < 60
