"""A run that is told to stop saves its last step, on every rank the same, and says KILLED."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import ROOT, metrics_of, write_run
from test_resume import PROGRAM, environment, uninterrupted  # noqa: F401  (a fixture)

pytestmark = pytest.mark.distributed

# Rank 1 alone is told, in the middle of step 4.
CALLBACK = """
import os, signal
from megatron_rl.trainer import Callback

class Tell(Callback):
    def on_step_begin(self, trainer, batch):
        if trainer.context.rank == 1 and trainer.step == 3 and os.environ.get("TELL"):
            os.kill(os.getpid(), getattr(signal, os.environ["TELL"]))
"""


def run(config: Path, tell: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM)]
    return subprocess.run(
        [*command, str(config), "parallel.tp=2"], env=environment(TELL=tell), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_all_ranks_stop_after_the_step_in_which_one_was_told_and_the_rerun_is_exact(tmp_path, uninterrupted):  # noqa: F811
    from mlflow.tracking import MlflowClient

    (tmp_path / "tell.py").write_text(CALLBACK)
    tracking = {"trackers": ["jsonl", "mlflow"]}
    config = write_run(tmp_path, callbacks=[f"{tmp_path}/tell.py:Tell"], tracking=tracking)
    stopped = run(config, tell="SIGTERM")
    assert stopped.returncode != 0
    assert "stopped by signal 15 after step 4" in stopped.stderr
    assert stopped.stderr.count("exitcode  : 143") >= 1, stopped.stderr[-3000:]
    assert (tmp_path / "out" / "checkpoints" / "step_000004" / ".metadata").is_file()
    client = MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("megatron_rl").experiment_id])
    assert [run.info.status for run in found] == ["KILLED"]
    done = run(config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics_of(tmp_path / "out") == uninterrupted[1]
    found = client.search_runs([client.get_experiment_by_name("megatron_rl").experiment_id])
    assert [run.info.status for run in found] == ["FINISHED"]


@pytest.mark.parametrize("slow", ["reward", "sampling"])
def test_a_step_longer_than_the_grace_is_given_up_and_the_state_before_it_saved(slow, tmp_path, uninterrupted):  # noqa: F811
    """The reward of step 4 never ends (and hides its exceptions), or one rank's engine never answers. SIGTERM goes to
    torchrun, as Slurm sends it."""
    from mlflow.tracking import MlflowClient

    small = f"{ROOT}/tests/run/small_run.py"
    tracking = {"trackers": ["jsonl", "mlflow"]}
    rewards = [{"name": f"python:{small}:slow_digits"}]
    config = write_run(tmp_path, callbacks=[f"{small}:SlowFrom"], tracking=tracking, rewards=rewards)
    mark = tmp_path / "slow"
    told = {"SLOW": str(mark)} | ({"SLOW_SAMPLING": "1"} if slow == "sampling" else {})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM)]
    command += [str(config), "parallel.tp=2"]
    with subprocess.Popen(
        [*command, "trainer.grace_seconds=24"], env=environment(**told), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as agent:  # fmt: skip
        try:
            wait_for(mark, agent)
            time.sleep(3)
            started = time.monotonic()
            agent.send_signal(signal.SIGTERM)
            errors = agent.communicate(timeout=120)[1]
        finally:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    assert time.monotonic() - started < 29
    assert agent.returncode != 0
    assert errors.count("stopped by signal 15 after step 3; the same command continues from there") == 2, errors[-4000:]
    assert (tmp_path / "out" / "checkpoints" / "step_000003" / ".metadata").is_file()
    client = MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("megatron_rl").experiment_id])
    assert [run.info.status for run in found] == ["KILLED"]
    done = run(config)
    assert done.returncode == 0, done.stderr[-3000:]
    names = {f"reward_parts/{name}/mean" for name in ("digits", "slow_digits")}
    assert without(metrics_of(tmp_path / "out"), names) == without(uninterrupted[1], names)


def without(metrics: dict[int, dict[str, float]], names: set[str]) -> dict[int, dict[str, float]]:
    return {step: {n: v for n, v in values.items() if n not in names} for step, values in metrics.items()}


def wait_for(mark: Path, process: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not mark.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_the_command_ends_with_the_code_of_its_signal(number, code, tmp_path):
    """One process, without torchrun."""
    config = write_run(tmp_path, callbacks=[f"{ROOT}/tests/run/small_run.py:Hold"])
    go = tmp_path / "go"
    command = [sys.executable, "-m", "megatron_rl", "train", str(config)]
    with subprocess.Popen(command, env=environment(HOLD_UNTIL=str(go)), stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(go.with_suffix(".held"), process)
            process.send_signal(number)
            time.sleep(0.5)
            go.touch()
            errors = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    assert process.returncode == code, errors[-3000:]
    assert f"stopped by signal {int(number)} after step 2" in errors
    assert "Traceback" not in errors
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


def test_nothing_but_what_is_abandonable_is_given_up_and_that_at_once_when_the_time_is_over():
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_UP], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


ENDLESS = """
import os, signal, time
from megatron_rl.trainer.interruption import Interruption
interruption = Interruption(0.2, lambda: print("closed", flush=True))
with interruption.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_run_that_does_not_stop_in_its_grace_is_ended_with_its_trackers_closed():
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "closed\n"), done.stderr
    assert time.monotonic() - started < 60
