"""`ConsoleTracker`: one compact line per step, with a progress bar below where the output is a terminal.

step  12/200 | reward/mean 0.412 | loss/policy -0.0031 | time/step_s 1.31
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import TextIO

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_rl.config import ConfigRecord
from megatron_rl.tracking.tracker import TRACKERS, TrackedRun, Tracker


@TRACKERS.register("console")
class ConsoleTracker(Tracker):
    """Writes to ``stream``, by default standard output as it is at construction."""

    class Config(ConfigRecord):
        """What the lines show."""

        columns: tuple[str, ...] = (
            "reward*/mean",
            "rewards/accuracies",
            "rewards/margins",
            "rollout/response_tokens_mean",
            "eval/*",
            "loss/*",
            "*kl*",
            "grad_norm",
            "*/grad_norm",
            "time/step_s",
        )
        """Metrics to show, in this order; * matches anything. Where none matches, the first ones are shown."""
        max_columns: int = Field(default=8, ge=1)
        """Metrics in a line at most."""
        every: int = Field(default=1, ge=1)
        """Show every n-th step, and every one with an evaluation."""

    config: Config

    def __init__(self, run: TrackedRun, config: ConfigRecord | None = None, stream: TextIO | None = None) -> None:
        super().__init__(run, config)
        self.stream = stream or sys.stdout
        self._progress: Progress | None = None
        self._began: float | None = None  # when `start` was called, and after which step
        self._first_step = 0

    def start(self, resume_step: int | None = None) -> None:
        self._began, self._first_step = time.monotonic(), resume_step or 0
        if self.stream.isatty():
            self._progress = self._start_bar(resume_step or 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        evaluation = any(name.startswith("eval/") for name in metrics)
        if evaluation or step % self.config.every == 0:
            self._write(self._line(metrics, step))
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def close(self, status: str = "finished") -> None:
        if self._progress is not None:
            self._progress.stop()

    def _start_bar(self, completed: int) -> Progress:
        columns = (
            TextColumn(self.run.name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=Console(file=self.stream), redirect_stdout=False, redirect_stderr=False)
        progress.add_task(self.run.name, total=self.run.total_steps, completed=completed)
        progress.start()
        return progress

    def _line(self, metrics: Mapping[str, float], step: int) -> str:
        total = self.run.total_steps
        head = f"step {step:>{len(str(total))}}/{total}" if total else f"step {step}"
        chosen = dict.fromkeys(n for pattern in self.config.columns for n in metrics if fnmatchcase(n, pattern))
        names = list(chosen or metrics)[: self.config.max_columns]
        return " | ".join([head, *(f"{name} {metrics[name]:.4g}" for name in names), *self._times(step)])

    def _times(self, step: int) -> list[str]:
        """Since the start of this process's part of the run, and what is left at that pace."""
        if self._began is None:
            return []
        elapsed, done = time.monotonic() - self._began, step - self._first_step
        times = [f"elapsed {timedelta(seconds=round(elapsed))}"]
        if self.run.total_steps and done > 0:
            times.append(f"left {timedelta(seconds=round(elapsed / done * (self.run.total_steps - step)))}")
        return times

    def _write(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self.stream.write(line + "\n")
            self.stream.flush()
