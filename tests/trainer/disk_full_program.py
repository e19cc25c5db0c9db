"""Test program: checkpoints of a tensor of 1 MiB a rank onto a disk that has less and less room for them.

For each amount of room: whether it could be written, what the run said, and what lies in the folder then. The room is
made by a ballast file on the disk given (argument 1: its mount point), or by the process's limit of a file's size.
Prints a JSON list from rank 0; every rank must have had the same error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import megatron_rl  # noqa: F401  (first: the CPU face)

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.trainer.checkpoint import DistributedCheckpoints
from megatron_rl.trainer.restart_point import CheckpointError

KIB = 1024
ROOM = [0, 24, 48, 1100, *range(2068, 2104, 4), 2400]  # KiB
FILE_SIZES = [1, 2, 64, 900]  # KiB
COMMON_BYTES = 20 * KIB


class Checkpoints(DistributedCheckpoints):
    """Its state is one tensor, and bytes in the common part."""

    def _sharded_state(self, trainer: Any, loading: bool, with_rng: bool = True) -> dict[str, Any]:
        rank, size = self.context.rank, self.context.world_size
        weight = ShardedTensor.from_rank_offsets("weight", torch.randn(KIB, 256), (0, rank, size))
        return {"weight": weight, "trainer": trainer.state_dict(), "bytes": b"\1" * COMMON_BYTES}


def attempt(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    trainer = SimpleNamespace(step=step, state_dict=lambda: {"step": step})
    try:
        checkpoints.save(trainer)
        checkpoints.finish()
        said = ""
    except CheckpointError as error:
        said = str(error)
    assert len(set(checkpoints.context.gather_objects(said))) == 1, "one error for all"
    checkpoints._writing = None  # a run would have ended
    beside = checkpoints.folder.parent
    left = sorted(path.name for folder in (beside, checkpoints.folder) for path in folder.iterdir())
    return {"said": said, "left": left}


def main(disk: Path, asynchronous: bool) -> None:
    context = ParallelContext.create(ParallelSizes(), seed=0)
    checkpoints = Checkpoints(disk / "out" / "checkpoints", context, {}, {}, keep_last=1, asynchronous=asynchronous)
    results = [attempt(checkpoints, 1)]
    for number, room in enumerate(ROOM):
        ballast = disk / "ballast"
        if context.rank == 0:
            free = os.statvfs(disk)
            with ballast.open("wb") as file:
                file.write(bytes(free.f_bavail * free.f_frsize - room * KIB))
        results.append(attempt(checkpoints, 2 + number) | {"room": room})
        if context.rank == 0:
            ballast.unlink()
    for number, size in enumerate(FILE_SIZES):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * KIB, resource.RLIM_INFINITY))
        results.append(attempt(checkpoints, 50 + number) | {"file_size": size})
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if context.rank == 0:
        print(json.dumps(results), flush=True)
    os._exit(0)  # checkpoints are tried here: after 19 of them, torch's threads now and then abort the end of a process


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["async"])
