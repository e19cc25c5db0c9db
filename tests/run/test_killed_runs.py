"""Runs with a lag that are killed anywhere, on either half, go on as if nothing had happened: to the last bit.

$KILLED_RUNS: how many.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from small_run import ROOT, environment, metrics_of, write_run

from megatron_rl.trainer.inflight.batch_journal import journal_path

pytestmark = pytest.mark.distributed

PROGRAM = ROOT / "tests" / "run" / "killed_program.py"
# ranks, of them rollout ranks, and the lag
SHAPES = {"one and one": (2, 1, 1), "one and two": (3, 2, 2)}
STEPS = 6


def start(folder: Path, shape: str, *overrides: str, **env: str) -> Any:
    ranks, rollout, lag = SHAPES[shape]
    config = folder / "config.yaml"
    if not config.exists():
        trainer = {"output_dir": str(folder / "out"), "num_steps": STEPS, "save_every": 2, "keep_last": 3, "trace": 3}
        write_run(folder, trainer=trainer)
    given = [f"parallel.rollout_ranks={rollout}", f"rollout_lag={lag}", *overrides]
    paths = environment()["PYTHONPATH"]
    return run_forked(PROGRAM, config, *given, nproc=ranks, timeout=280, PYTHONPATH=paths, **env)


def result(folder: Path) -> tuple[dict[int, dict[str, float]], bytes]:
    """What must be the same: metrics, and the weights of the trained model."""
    return metrics_of(folder / "out"), (folder / "out" / "hf" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, list[int], Path]]:
    """shape -> result of the run that nothing happened to, how much each rank does in it, and its folder."""
    known: dict[str, tuple[Any, list[int], Path]] = {}

    def run(shape: str) -> tuple[Any, list[int], Path]:
        if shape not in known:
            folder = tmp_path_factory.mktemp("whole")
            ended = start(folder, shape, COUNTS=str(folder / "counts"))
            assert ended.code == 0, ended.err[-4000:]
            counts = [int((folder / f"counts.{rank}").read_text()) for rank in range(SHAPES[shape][0])]
            known[shape] = result(folder), counts, folder
        return known[shape]

    return run


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLED_RUNS", "4"))))
def test_a_run_that_is_killed_anywhere_goes_on_to_the_bit(seed: int, whole, tmp_path: Path):
    rng = random.Random(seed)
    shape = rng.choice(sorted(SHAPES))
    expected, counts, _ = whole(shape)
    rank = seed % len(counts)
    at = rng.randrange(1, counts[rank] + 1)
    ended = start(tmp_path, shape, KILL=f"{rank} {at}")
    assert ended.code != 0, f"rank {rank} was to be killed at {at} of {counts[rank]}"
    again = start(tmp_path, shape)
    assert again.code == 0, again.err[-4000:]
    assert result(tmp_path) == expected, f"rank {rank} was killed at {at} of {counts[rank]}"


@pytest.mark.parametrize("fault", ["none", "torn", "flipped", "lost"])
def test_a_resumed_run_takes_batches_from_whole_journals_and_samples_others_again(fault: str, whole, tmp_path: Path):
    """Of the whole run only the checkpoint of step 4 and the journal are left, which has batch 5."""
    expected, _, folder = whole("one and one")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = (tmp_path / "config.yaml").read_text().replace(f"{folder}/out", f"{tmp_path}/out")
    (tmp_path / "config.yaml").write_text(config)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / f"step_{STEPS:06d}")
    path = journal_path(tmp_path / "out" / "journal", 1)
    data = bytearray(path.read_bytes())
    if fault == "torn":
        path.write_bytes(data[:-5])
    elif fault == "flipped":
        data[-200] ^= 8
        path.write_bytes(data)
    elif fault == "lost":
        path.unlink()
    ended = start(tmp_path, "one and one")
    assert ended.code == 0, ended.err[-4000:]
    assert result(tmp_path) == expected
    assert ("batch 5 was finished before the run was resumed" in ended.err) == (fault == "none"), ended.err[-4000:]
    said = {"torn": "is not whole", "flipped": "is damaged", "none": "", "lost": ""}
    assert said[fault] in ended.err


def test_the_trace_of_a_run_shows_both_halves(whole):
    _, _, folder = whole("one and two")
    events = [event for event in json.loads((folder / "out" / "trace.json").read_text()) if event["ph"] == "X"]
    rows = {(event["pid"], event["cat"], event["name"]) for event in events}
    for rank in (1, 2):
        for name in ("push", "generate"):
            assert (rank, "engine", name) in rows
        assert (rank, "stages", "actor.sample") in rows
        assert (rank, "waiting", "training ranks") in rows
    assert {(0, "stages", "actor.receive"), (0, "stages", "actor.optimize")} <= rows
    assert not any(rank == 0 and kind == "engine" for rank, kind, _ in rows)
    assert {event["args"]["step"] for event in events} == {1, 2, 3}
