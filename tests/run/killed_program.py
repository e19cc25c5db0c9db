"""`train_program` in which one rank is killed at the n-th of the things it does: $KILL = "rank n".

Counted are steps of stages, messages between ranks, pushes, and what is written, synced and renamed; a journal's record
is left half-written. Without $KILL nothing is counted but for $COUNTS, the file into which each rank writes its number.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.cli import main
from megatron_rl.dataflow import Stage
from megatron_rl.parallel.messages import Messages
from megatron_rl.weights.sync import WeightSync

RANK = os.environ["RANK"]
KILLED, AT = os.environ.get("KILL", "-1 0").split()
done = 0


def counted(owner: Any, name: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def count(*arguments: Any, **named: Any) -> Any:
        global done
        done += 1
        if KILLED == RANK and done == int(AT):
            if name == "pwrite":
                original(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(owner, name, count)


if __name__ == "__main__":
    import sys

    for owner, name in (
        (os, "pwrite"), (os, "fdatasync"), (os, "replace"), (Path, "rename"), (Messages, "send"), (Messages, "receive"),
        (Stage, "execute"), (WeightSync, "push"),
    ):  # fmt: skip
        counted(owner, name)
    sys.argv.insert(1, "train")
    try:
        main()
    finally:
        if "COUNTS" in os.environ:
            Path(f"{os.environ['COUNTS']}.{RANK}").write_text(str(done))
