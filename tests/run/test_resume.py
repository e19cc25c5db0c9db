"""A run that is killed and resumed gives the metrics of an uninterrupted one, to the last bit.

Launch and restart are torchrun's own, once with ranks as processes of their own. Other ranks are forks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_forked, run_ranks
from forked_torchrun import run_forked_torchrun, start_forked_torchrun
from small_run import PROGRAM, ROOT, environment, flip_a_bit, metrics_of, write_run
from torchrun import free_port

pytestmark = pytest.mark.distributed
SMALL = f"{ROOT}/tests/run/small_run.py"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, dict[int, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("whole")
    config = write_run(folder)
    run_ranks(PROGRAM, 2, config, "parallel.tp=2", "trainer.trace=2", PYTHONPATH=environment()["PYTHONPATH"])
    return folder, metrics_of(folder / "out")


def test_the_first_steps_are_drawn_as_a_trace(uninterrupted):
    folder, _ = uninterrupted
    events = [event for event in json.loads((folder / "out" / "trace.json").read_text()) if event["ph"] == "X"]
    assert {event["args"]["step"] for event in events} == {1, 2}
    for rank in (0, 1):
        own = [event for event in events if (event["pid"], event["args"]["step"]) == (rank, 1)]
        stages = [event for event in own if event["cat"] == "stages"]
        assert [e["name"] for e in stages][:4] == ["next prompts", "actor.sample", "reward.score", "batch.pack"]
        ends = [event["ts"] + event["dur"] for event in stages]
        assert all(end <= later["ts"] + 2 for end, later in zip(ends, stages[1:], strict=False)), "one after another"
        sample = stages[1]
        inside = [event for event in own if event["cat"] != "stages"]
        assert {event["name"] for event in inside} >= {"push", "generate", "other ranks generate"}
        within = [event for event in inside if event["name"] in ("push", "generate")]
        assert all(sample["ts"] <= event["ts"] + 2 for event in within)
        assert all(event["ts"] + event["dur"] <= ends[1] + 2 for event in within)


def test_a_killed_rank_is_restarted_by_torchrun_on_two_agents_and_the_run_resumes_exactly(tmp_path, uninterrupted):
    """Two torchrun agents on one machine, one rank each; rank 1 is killed in step 4, after the checkpoint of step 2."""
    _, expected = uninterrupted
    config = write_run(tmp_path, callbacks=[f"{SMALL}:KillOnce"])
    mark = tmp_path / "killed"
    command = [
        "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
        f"127.0.0.1:{free_port()}", "--rdzv-id", "resume", "--local-addr", "127.0.0.1", PROGRAM, config,
        "parallel.tp=2",
    ]  # fmt: skip
    given = {"timeout": 400, "PYTHONPATH": environment()["PYTHONPATH"], "KILL": f"1 3 {mark}"}
    with start_forked_torchrun(*command, **given) as other:
        ended = [run_forked_torchrun(*command, **given), other.wait()]
    assert mark.exists()
    assert [agent.code for agent in ended] == [0, 0], ended[0].err[-3000:] + ended[1].err[-3000:]
    assert metrics_of(tmp_path / "out") == expected


def test_a_rank_that_is_a_process_of_its_own_is_restarted_too(tmp_path):
    """What forks share with the process that made them could hide a mistake."""
    ranks, steps = 1, ("trainer.num_steps=4", "trainer.save_every=2")
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole, config = write_run(tmp_path / "whole"), write_run(tmp_path / "killed", callbacks=[f"{SMALL}:KillOnce"])
    run_ranks(PROGRAM, ranks, whole, *steps, PYTHONPATH=environment()["PYTHONPATH"])
    mark = tmp_path / "mark"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command += ["--nproc-per-node", str(ranks), str(PROGRAM), str(config), *steps]
    done = subprocess.run(
        command, env=environment(KILL=f"0 2 {mark}"), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert mark.exists()
    assert metrics_of(tmp_path / "killed" / "out") == metrics_of(tmp_path / "whole" / "out")


def restarted(where: list[object], config: Path, max_restarts: int, **faults: str) -> str:
    """Run on one node until it has ended well; returns standard error."""
    arguments = [*where, "--nproc-per-node", 2, "--max-restarts", max_restarts, PROGRAM, config, "parallel.tp=2"]
    ended = run_forked_torchrun(*arguments, timeout=500, PYTHONPATH=environment()["PYTHONPATH"], **faults)
    assert ended.code == 0, ended.err[-4000:]
    return ended.err


def test_restarts_on_one_node_need_no_environment_variable(tmp_path, uninterrupted, monkeypatch):
    """Rank 0, whose addresses all others look for, is killed in step 4."""
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    config = write_run(tmp_path, callbacks=[f"{SMALL}:KillOnce"])
    restarted(["--master-port", free_port()], config, 1, KILL=f"0 3 {tmp_path / 'killed'}")
    assert (tmp_path / "killed").exists()
    assert metrics_of(tmp_path / "out") == uninterrupted[1]


@pytest.fixture(scope="module")
def killed_and_damaged(tmp_path_factory) -> tuple[Path, Path, str]:
    """A run under `torchrun --standalone`: its configuration, its checkpoints and what it said.

    Rank 0 is killed in step 4. When the run has come to step 5, a bit of the weights of step 4 is flipped and rank 1 is
    killed.
    """
    folder = tmp_path_factory.mktemp("damaged")
    config = write_run(folder, callbacks=[f"{SMALL}:KillOnce", f"{SMALL}:DamageOnce"])
    faults = {"KILL": f"0 3 {folder / 'killed'}", "DAMAGE": f"1 4 {folder / 'damaged'}"}
    errors = restarted(["--standalone"], config, 2, **faults)
    assert (folder / "killed").exists()
    assert (folder / "damaged").exists()
    return config, folder / "out" / "checkpoints", errors


def test_every_restart_passes_over_a_damaged_checkpoint(killed_and_damaged, uninterrupted):
    _, checkpoints, errors = killed_and_damaged
    said = f"checkpoint {checkpoints}/step_000004 is damaged: __"
    warnings = [line for line in errors.splitlines() if said in line]
    assert sorted(line.split("[")[1][:6] for line in warnings) == ["rank 0", "rank 1"], errors[-4000:]
    assert all(line.endswith(f"continuing from {checkpoints}/step_000002, the newest intact one") for line in warnings)
    assert metrics_of(checkpoints.parent) == uninterrupted[1]


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_refused(killed_and_damaged):
    config, checkpoints, _ = killed_and_damaged
    name = flip_a_bit(checkpoints / "step_000006")
    arguments = (config, "parallel.tp=2", "trainer.resume=step_000006")
    ended = run_forked(PROGRAM, *arguments, nproc=2, PYTHONPATH=environment()["PYTHONPATH"])
    assert ended.code != 0
    refused = [line for line in ended.err.splitlines() if "CheckpointError" in line]
    assert len(refused) == 2, ended.err[-4000:]
    for line in refused:
        assert f"checkpoint {checkpoints}/step_000006 is damaged: {name} is not as it was written" in line
        assert line.endswith(f"the newest intact one is {checkpoints}/step_000004: trainer.resume=step_000004")
    assert "Traceback (most recent call last)" not in ended.err


def test_resume_on_another_layout_continues_with_the_same_rollouts(tmp_path, uninterrupted):
    """Weights, optimizer, data cursor and seeds survive TP2 -> PP2; sums round differently, so not to the last bit."""
    folder, expected = uninterrupted
    config = write_run(tmp_path)
    resume = f"trainer.resume={folder / 'out' / 'checkpoints' / 'step_000004'}"
    run_ranks(PROGRAM, 2, config, "parallel.pp=2", resume, PYTHONPATH=environment()["PYTHONPATH"])
    resumed = metrics_of(tmp_path / "out")
    assert set(resumed) == {5, 6}
    for step in (5, 6):
        for name in ("rewards/mean", "loss/kl", "optimizer/gradient_norm", "optimizer/learning_rate"):
            assert resumed[step][name] == pytest.approx(expected[step][name], rel=1e-3, abs=1e-6), (step, name)


def test_checkpoints_are_complete_and_only_the_newest_are_kept(uninterrupted):
    folder, _ = uninterrupted
    names = sorted(path.name for path in (folder / "out" / "checkpoints").iterdir())
    assert names == ["step_000004", "step_000006"]


def test_plain_values_of_a_checkpoint_are_those_of_every_rank(tmp_path):
    """Megatron-Core keeps rank 0's, and warns of others: after an evaluation, which no two ranks end at once, too."""
    config = write_run(tmp_path, evaluation={"n": 1, "data": {"path": str(tmp_path / "train.jsonl")}})
    given = ["parallel.tp=2", "trainer.evaluate_every=1", "trainer.num_steps=2", "trainer.save_every=1"]
    ended = run_forked(PROGRAM, config, *given, nproc=2, timeout=300, PYTHONPATH=environment()["PYTHONPATH"])
    assert ended.code == 0, ended.err[-3000:]
    assert "differs from rank 0" not in ended.err + ended.out
