"""`TensorboardTracker`: event files in ``<output_dir>/tensorboard``.

tensorboard --logdir <output_dir>/tensorboard
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from megatron_rl.config import ConfigRecord
from megatron_rl.tracking.names import LegalNames
from megatron_rl.tracking.tracker import TRACKERS, TrackedRun, Tracker

FOLDER = "tensorboard"
ILLEGAL = r"[^-/\w.]|^/+"  # torch.utils.tensorboard replaces these itself, and then two names may be one


@TRACKERS.register("tensorboard")
class TensorboardTracker(Tracker):
    """One scalar per metric; parameters as a text table. A resumed run hides the steps after its checkpoint."""

    package: ClassVar[str] = "tensorboard"

    def __init__(self, run: TrackedRun, config: ConfigRecord | None = None) -> None:
        super().__init__(run, config)
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run.output_dir / FOLDER
        self._open = partial(SummaryWriter, str(self._folder))
        self._writer: Any = None
        self._names = LegalNames(ILLEGAL)

    def start(self, resume_step: int | None = None) -> None:
        # A run that starts anew hides all steps of one that was killed before its first checkpoint.
        left = any(self._folder.glob("events.*"))
        self._writer = self._open(purge_step=None if not left else 0 if resume_step is None else resume_step + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(self._names(name), float(value), step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in params.items())
        self._writer.add_text("config", f"| parameter | value |\n|---|---|\n{rows}")

    def close(self, status: str = "finished") -> None:
        if self._writer is not None:
            self._writer.close()
