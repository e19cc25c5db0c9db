"""One run at a time in an output folder; a run that fails to start takes away only what it made."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import run_forked
from forked_torchrun import start_forked_torchrun
from small_run import PROGRAM, ROOT, environment, metrics_of, write_run

from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.trainer.output_lock import LOCK_FILE, OutputLock
from megatron_rl.workers.job_context import check_share

ALONE = SimpleNamespace(rank=0, gather_objects=lambda value: [value])


def test_a_second_run_is_refused_on_every_rank_until_the_first_has_ended(tmp_path):
    first = OutputLock(tmp_path / "out", ALONE)
    (tmp_path / "out" / "metrics.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=rf"in use by another run \(process {os.getpid()} on "):
        OutputLock(tmp_path / "out", ALONE)
    said = "in use"
    with pytest.raises(ConfigError, match=said):  # rank 1 hears what rank 0 found
        OutputLock(tmp_path / "out", SimpleNamespace(rank=1, gather_objects=lambda value: [said, value]))
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == "mine"
    first.release()
    OutputLock(tmp_path / "out", ALONE).release()


@pytest.mark.distributed
def test_a_second_run_is_refused_in_one_line_a_rank_and_the_first_under_torchrun_goes_on(tmp_path):
    """The second is another configuration, started while the first is in its step 2."""
    config = write_run(tmp_path, callbacks=[f"{ROOT}/tests/run/small_run.py:Hold"])
    go, paths = tmp_path / "go", environment()["PYTHONPATH"]
    given = ("--standalone", "--nproc-per-node", 2, PROGRAM, config, "parallel.tp=2")
    with start_forked_torchrun(*given, PYTHONPATH=paths, HOLD_UNTIL=str(go)) as first:
        deadline = time.monotonic() + 200
        while not go.with_suffix(".held").exists():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        second = run_forked(PROGRAM, config, "parallel.tp=2", "seed=8", nproc=2, PYTHONPATH=paths)
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
        go.touch()
        ended = first.wait()
    refused = [line for line in second.err.splitlines() if "ConfigError" in line]
    assert sorted(line.split("]")[0] for line in refused) == ["[rank 0", "[rank 1"], second.err[-3000:]
    for line in refused:
        assert f"trainer.output_dir={tmp_path / 'out'} is in use by another run (process " in line
    assert second.code != 0
    assert ended.code == 0, ended.err[-3000:]
    assert sorted(metrics_of(tmp_path / "out")) == [1, 2, 3, 4, 5, 6]
    assert "seed: 0" in (tmp_path / "out" / "config.yaml").read_text()


def test_a_fork_does_not_keep_the_lock_of_a_process_that_was_killed(tmp_path):
    """As a checkpoint's writer, which may outlive a killed rank."""
    lock = OutputLock(tmp_path / "out", ALONE)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"x")
        signal.pause()
        os._exit(0)
    try:
        os.read(read, 1)
        lock.release()
        with (tmp_path / "out" / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_only_what_the_run_made_is_taken_away(tmp_path):
    OutputLock(tmp_path / "new" / "deep" / "out", ALONE).discard()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    OutputLock(tmp_path / "old", ALONE).discard()
    OutputLock(tmp_path / "old" / "out", ALONE).discard()
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == [LOCK_FILE, "notes.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        OutputLock(Path(tmp_path / "file" / "out"), ALONE)


def test_a_loader_for_another_replica_is_refused():
    grid = RankGrid(ParallelSizes(tp=2), 4)
    context = SimpleNamespace(coordinates=grid.coordinates(2), dp_size=grid.dp)
    check_share((1, 2), context)
    for wrong in ((0, 1), (0, 2), (1, 4)):
        with pytest.raises(ConfigError, match="this is rank 1 of 2: give the actor to the loader"):
            check_share(wrong, context)
