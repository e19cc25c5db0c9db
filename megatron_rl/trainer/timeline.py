"""`Trace`: the first steps of a run as a picture of who worked and who waited, ``<output_dir>/trace.json``.

The file is a Chrome trace (https://ui.perfetto.dev or chrome://tracing opens it): a process for each rank, in it a row
for stages, one for the rollout engine and one for waiting. Rank 0 appends each step as it ends, so the file is whole
at any time and nothing is kept in memory. Times are the ranks' own clocks: as equal as the machines' clocks are.

Format: "Trace Event Format" (Google, JSON array of complete events "X" and metadata "M"), timestamps in microseconds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.batch.work_time import WorkTime
from megatron_rl.parallel import ParallelContext

logger = logging.getLogger(__name__)

FILE_NAME = "trace.json"
ROWS = ("stages", "engine", "waiting")
_END = b"\n]\n"


class Trace:
    """Collects one rank's work, and on rank 0 writes that of all.

    Args:
        num_steps: steps from the start of this process that are traced; 0: none.
        rank: in the numbering of the job.
        place: of this rank in the layout, for the picture.
    """

    def __init__(self, output_dir: Path, num_steps: int, rank: int, place: str) -> None:
        self.path = output_dir / FILE_NAME
        self.rank, self.place = rank, place
        self._steps_left = num_steps
        self._work: list[WorkTime] = []
        self._clock = time.time() - time.perf_counter()
        self._named: set[tuple[int, str]] = set()  # rows that the file has names for

    @property
    def active(self) -> bool:
        """Whether the present step is traced; the same on every rank."""
        return self._steps_left > 0

    def add(self, *work: WorkTime) -> None:
        """Work of this rank outside of a batch."""
        if self.active:
            self._work += work

    def take(self, step: int) -> list[dict[str, Any]]:
        """This rank's events since the last call; the step is over."""
        if not self.active:
            return []
        self._steps_left -= 1
        events, self._work = [self._event(work, step) for work in self._work], []
        return events

    def _event(self, work: WorkTime, step: int) -> dict[str, Any]:
        return {
            "ph": "X",
            "name": work.name,
            "cat": work.row,
            "ts": round((work.started + self._clock) * 1e6),
            "dur": round(work.seconds * 1e6),
            "pid": self.rank,
            "tid": ROWS.index(work.row),
            "args": {"step": step, "place": self.place},
        }

    def start(self, resumed: bool) -> None:
        """On rank 0: begin the file, or go on with that of the run which is resumed."""
        if self.active and not (resumed and self.path.is_file()):
            self.path.write_bytes(b"[" + _END)

    def write(self, per_rank: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """On rank 0: append what `take` returned on each rank."""
        events = [event for events in per_rank for event in events]
        if not events:
            return
        lines = [json.dumps(event) for event in [*self._names(events), *events]]
        with self.path.open("r+b") as file:
            end = file.seek(-len(_END), 2)
            comma = b"," if end > 1 else b""
            file.write(comma + b"\n" + ",\n".join(lines).encode() + _END)
        if not self.active:
            logger.info("%s is complete: open it at https://ui.perfetto.dev", self.path)

    def _names(self, events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Metadata of the ranks and rows that occur for the first time."""
        found = []
        for event in events:
            rank, row = event["pid"], event["cat"]
            if (rank, "") not in self._named:
                self._named.add((rank, ""))
                label = f"rank {rank} ({event['args']['place']})"
                found.append(_metadata("process_name", rank, 0, name=label))
                found.append(_metadata("process_sort_index", rank, 0, sort_index=rank))
            if (rank, row) not in self._named:
                self._named.add((rank, row))
                found.append(_metadata("thread_name", rank, event["tid"], name=row))
                found.append(_metadata("thread_sort_index", rank, event["tid"], sort_index=event["tid"]))
        return found


def trace_of(context: ParallelContext, output_dir: Path, num_steps: int) -> Trace:
    """The trace of this rank, which is numbered as torchrun numbers it."""
    place = ", ".join(f"{axis} {getattr(context.coordinates, axis)}" for axis in ("dp", "pp", "cp", "tp"))
    if context.split is None:
        return Trace(output_dir, num_steps, context.rank, place)
    half = "rollout" if context.split.on_rollout else f"training, {place}"
    return Trace(output_dir, num_steps, context.split.rank, half)


def _metadata(kind: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}
