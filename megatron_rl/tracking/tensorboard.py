"""`TensorboardTracker`: event files in ``<output_dir>/tensorboard``.

tensorboard --logdir <output_dir>/tensorboard
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron_rl.config import ConfigRecord
from megatron_rl.tracking.tracker import TRACKERS, TrackedRun, Tracker

FOLDER = "tensorboard"


@TRACKERS.register("tensorboard")
class TensorboardTracker(Tracker):
    """One scalar per metric; parameters as a text table. A resumed run hides the steps after its checkpoint."""

    package: ClassVar[str] = "tensorboard"

    def __init__(self, run: TrackedRun, config: ConfigRecord | None = None) -> None:
        super().__init__(run, config)
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if run.resume_step is None else run.resume_step + 1
        self._writer = SummaryWriter(str(run.output_dir / FOLDER), purge_step=purge_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in params.items())
        self._writer.add_text("config", f"| parameter | value |\n|---|---|\n{rows}")

    def close(self, status: str = "finished") -> None:
        self._writer.close()
