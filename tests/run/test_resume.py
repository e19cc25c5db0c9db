"""A run that is killed and resumed gives the metrics of an uninterrupted one, to the last bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_ranks
from small_run import ROOT, flip_a_bit, metrics_of, write_run
from torchrun import run_torchrun

pytestmark = pytest.mark.distributed
PROGRAM = ROOT / "tests" / "run" / "train_program.py"


def environment(**extra: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "run"), os.environ.get("PYTHONPATH", "")]
    return (
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"} | extra
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, dict[int, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("whole")
    config = write_run(folder)
    run_ranks(PROGRAM, 2, str(config), "parallel.tp=2", PYTHONPATH=environment()["PYTHONPATH"])
    return folder, metrics_of(folder / "out")


def test_a_killed_rank_is_restarted_by_torchrun_on_two_agents_and_the_run_resumes_exactly(tmp_path, uninterrupted):
    """Two torchrun agents on one machine, one rank each; rank 1 is killed in step 4, after the checkpoint of step 2."""
    _, expected = uninterrupted
    config = write_run(tmp_path, callbacks=[f"{ROOT}/tests/run/small_run.py:KillOnce"])
    port = free_port()
    mark = tmp_path / "killed"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "resume", "--local-addr",
        "127.0.0.1", str(PROGRAM), str(config), "parallel.tp=2",
    ]  # fmt: skip
    kill = environment(KILL_MARK=str(mark), KILL_RANK="1", KILL_STEP="3")
    agents = [
        subprocess.Popen(command, env=kill, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         start_new_session=True)
        for _ in range(2)
    ]  # fmt: skip
    try:
        outputs = [agent.communicate(timeout=400)[0] for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, 9)
    assert mark.exists()
    assert [agent.returncode for agent in agents] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert metrics_of(tmp_path / "out") == expected


@pytest.mark.parametrize("how", ["--standalone", "--master-port"])
def test_restarts_on_one_node_need_no_environment_variable(how, tmp_path, uninterrupted):
    """Rank 0, whose addresses all others look for, is killed in step 4."""
    _, expected = uninterrupted
    config = write_run(tmp_path, callbacks=[f"{ROOT}/tests/run/small_run.py:KillOnce"])
    where = [how] if how == "--standalone" else [how, str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", "2", "--max-restarts", "1"]
    kill = environment(KILL_MARK=str(tmp_path / "killed"), KILL_RANK="0", KILL_STEP="3")
    kill.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    done = subprocess.run(
        [*command, str(PROGRAM), str(config), "parallel.tp=2"], env=kill, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "killed").exists()
    assert metrics_of(tmp_path / "out") == expected


def test_every_restart_passes_over_a_damaged_checkpoint_and_one_asked_for_by_name_is_refused(tmp_path, uninterrupted):
    """A bit of the weights of step 4 is flipped, then rank 1 is killed in step 5."""
    _, expected = uninterrupted
    config = write_run(tmp_path, callbacks=[f"{ROOT}/tests/run/small_run.py:DamageOnce"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [str(PROGRAM), str(config), "parallel.tp=2"]
    kill = environment(KILL_MARK=str(tmp_path / "killed"), KILL_RANK="1", KILL_STEP="4")
    done = subprocess.run(
        [*command, "--max-restarts", "1", *program], env=kill, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    checkpoints = tmp_path / "out" / "checkpoints"
    said = f"checkpoint {checkpoints}/step_000004 is damaged: __"
    warnings = [line for line in done.stderr.splitlines() if said in line]
    assert sorted(line.split("[")[1][:6] for line in warnings) == ["rank 0", "rank 1"], done.stderr[-4000:]
    assert all(line.endswith(f"going on from {checkpoints}/step_000002, the newest intact one") for line in warnings)
    assert metrics_of(tmp_path / "out") == expected
    name = flip_a_bit(checkpoints / "step_000006")
    done = subprocess.run(
        [*command, *program, "trainer.resume=step_000006"], env=kill, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    refused = [line for line in done.stderr.splitlines() if "CheckpointError" in line]
    assert len(refused) == 2, done.stderr[-4000:]
    for line in refused:
        assert f"checkpoint {checkpoints}/step_000006 is damaged: {name} is not as it was written" in line
        assert line.endswith(f"the newest intact one is {checkpoints}/step_000004: trainer.resume=step_000004")
    assert "Traceback (most recent call last)" not in done.stderr.split("torch/distributed/elastic")[0]


def test_resume_on_another_layout_continues_with_the_same_rollouts(tmp_path, uninterrupted):
    """Weights, optimizer, data cursor and seeds survive TP2 -> PP2; sums round differently, so not to the last bit."""
    folder, expected = uninterrupted
    config = write_run(tmp_path)
    resume = f"trainer.resume={folder / 'out' / 'checkpoints' / 'step_000004'}"
    run_torchrun(PROGRAM, 2, str(config), "parallel.pp=2", resume, PYTHONPATH=environment()["PYTHONPATH"])
    resumed = metrics_of(tmp_path / "out")
    assert set(resumed) == {5, 6}
    for step in (5, 6):
        for name in ("rewards/mean", "loss/kl", "optimizer/gradient_norm", "optimizer/learning_rate"):
            assert resumed[step][name] == pytest.approx(expected[step][name], rel=1e-3, abs=1e-6), (step, name)


def test_checkpoints_are_complete_and_only_the_newest_are_kept(uninterrupted):
    folder, _ = uninterrupted
    names = sorted(path.name for path in (folder / "out" / "checkpoints").iterdir())
    assert names == ["step_000004", "step_000006"]
