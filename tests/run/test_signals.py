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
