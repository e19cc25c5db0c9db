"""`TensorboardTracker`: event files in ``<output_dir>/tensorboard``.

tensorboard --logdir <output_dir>/tensorboard
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from megatron_rl.config import ConfigRecord
from megatron_rl.tracking.names import LegalNames
from megatron_rl.tracking.tracker import TRACKERS, TrackedRun, Tracker

FOLDER = "tensorboard"
CONFIG = "config"  # tag of the parameters, which every start writes
ILLEGAL = r"[^-/\w.]|^/+"  # torch.utils.tensorboard replaces these itself, and then two names may be one


@TRACKERS.register("tensorboard")
class TensorboardTracker(Tracker):
    """One scalar per metric; parameters as a text table. What a run wrote after the checkpoint that it is resumed from
    is removed from its event files; a run that starts anew begins without any."""

    package: ClassVar[str] = "tensorboard"

    def __init__(self, run: TrackedRun, config: ConfigRecord | None = None) -> None:
        super().__init__(run, config)
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run.output_dir / FOLDER
        self._open = partial(SummaryWriter, str(self._folder))
        self._writer: Any = None
        self._names = LegalNames(ILLEGAL)
        self._earlier: list[Path] = []  # event files of the run that this one resumes

    def start(self, resume_step: int | None = None) -> None:
        left = sorted(self._folder.glob("*tfevents*"))
        for path in left:
            if resume_step is None:
                path.unlink()
            else:
                keep(path, lambda event: event.step <= resume_step)
                self._earlier.append(path)
        # A running TensorBoard has already read the removed events; purge_step makes it drop them.
        self._writer = self._open(purge_step=None if not left else 0 if resume_step is None else resume_step + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(self._names(name), float(value), step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in params.items())
        for path in self._earlier:
            keep(path, lambda event: all(value.tag != f"{CONFIG}/text_summary" for value in event.summary.value))
        self._writer.add_text(CONFIG, f"| parameter | value |\n|---|---|\n{rows}")

    def close(self, status: str = "finished") -> None:
        if self._writer is not None:
            self._writer.close()


def keep(path: Path, wanted: Callable[[Any], bool]) -> None:
    """Remove all but the ``wanted`` events from an event file, and a partial last record."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    partial = path.with_name(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        writer = RecordWriter(file)
        for record in RawEventFileLoader(str(path)).Load():
            if wanted(Event.FromString(record)):
                writer.write(record)
        writer.flush()
    os.replace(partial, path)
