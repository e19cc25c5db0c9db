"""`JsonlTracker`: one JSON line per step in ``metrics.jsonl``, exact to the last bit and truncated on resume.

Floats are written so that they read back identical; NaN and infinities are the strings "NaN", "Infinity" and
"-Infinity", so that every line is strict JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from megatron_rl.config import ConfigRecord
from megatron_rl.tracking.tracker import TRACKERS, TrackedRun, Tracker

FILE_NAME = "metrics.jsonl"


@TRACKERS.register("jsonl")
class JsonlTracker(Tracker):
    """Appends to ``<output_dir>/metrics.jsonl``; each line reaches the file before `log` returns.

    A run that starts anew overwrites the file. A resumed run keeps the lines up to the checkpoint's step and drops
    what the interrupted run wrote later, a partial last line included, so that the file never holds a step twice.
    """

    def __init__(self, run: TrackedRun, config: ConfigRecord | None = None) -> None:
        super().__init__(run, config)
        self.path = run.output_dir / FILE_NAME
        self._file: TextIO | None = None

    def start(self, resume_step: int | None = None) -> None:
        kept = [] if resume_step is None else _lines_through(self.path, resume_step)
        partial = self.path.with_name(f".{FILE_NAME}.{os.getpid()}")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        assert self._file is not None, "start() comes before log()"
        values = {name: _encode(float(value)) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self, status: str = "finished") -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """All metrics by step, in the order written; a half-written last line is left out."""
    steps: dict[int, dict[str, float]] = {}
    for line in _complete_lines(path):
        record = json.loads(line)
        step = record.pop("step")
        steps.setdefault(step, {}).update({name: float(value) for name, value in record.items()})
    return steps


def _lines_through(path: Path, last_step: int) -> list[str]:
    return [line for line in _complete_lines(path) if json.loads(line)["step"] <= last_step]


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _encode(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
