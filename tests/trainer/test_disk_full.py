"""A disk without room for a checkpoint: every rank says so in the same line, and the previous checkpoint stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import run_ranks
from small_disk import mounted_disk

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).with_name("disk_full_program.py")
FULL, ROOMY = 11, 3  # of its amounts of room


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    with mounted_disk(tmp_path, "8m") as disk:
        yield disk


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_full_disk_is_said_on_every_rank_and_leaves_the_previous_checkpoint_alone(how, small_disk):
    """Whichever file is the first without room: common.pt, tensors, .metadata, metadata.json, digests, the order."""
    first, *results = json.loads(run_ranks(PROGRAM, 2, small_disk, how).splitlines()[-1])
    assert first == {"said": "", "left": [".checkpoints.order", "checkpoints", "step_000001"]}
    with_room = [result for result in results if "room" in result]
    assert [bool(result["said"]) for result in with_room] == [True] * FULL + [False] * ROOMY
    folder = small_disk / "out" / "checkpoints"
    for step, result in enumerate(with_room[:FULL], start=2):
        assert result["said"].startswith(
            f"disk full: checkpoint {folder}/step_{step:06d} could not be written (No space left on device; 0.0 MiB"
        )
        assert "step_000001 stands, and the same command continues from there" in result["said"]
        assert result["left"] == first["left"]
    for step, result in enumerate(with_room[FULL:], start=2 + FULL):
        assert result["left"] == [".checkpoints.order", "checkpoints", f"step_{step:06d}"]
    last = f"step_{1 + len(with_room):06d}"
    for result in results[len(with_room) :]:  # a limit of a file's size
        assert "could not be written (File too large" in result["said"]
        assert f"{last} stands" in result["said"]
        assert result["left"] == [".checkpoints.order", "checkpoints", last]
