"""`Callback`: user code at each event of a training run; override the methods you need.

Callbacks run on every rank, in the order given. They may read the trainer, change ``metrics`` in place before they are
tracked, and end the run with ``trainer.stop("why")``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_rl.batch import Batch
from megatron_rl.dataflow import Flow
from megatron_rl.parallel import ParallelContext


class TrainerView(Protocol):
    """What a callback sees of the trainer."""

    flow: Flow
    context: ParallelContext
    step: int  # steps completed
    history: dict[str, float]  # the newest metrics

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""

    @property
    def output_dir(self) -> Path:
        """The run's folder."""

    def stop(self, reason: str) -> None:
        """End the run after the present step. Call it on every rank."""


class Callback:
    """Base class: every event does nothing."""

    def on_train_begin(self, trainer: TrainerView) -> None:
        """After a checkpoint was restored, before the first step."""

    def on_step_begin(self, trainer: TrainerView, batch: Batch) -> None:
        """The batch holds only its input."""

    def on_step_end(self, trainer: TrainerView, batch: Batch, metrics: dict[str, float]) -> None:
        """``metrics`` are reduced over ranks and not yet tracked; ``batch`` holds samples and rewards."""

    def on_evaluate(self, trainer: TrainerView, metrics: dict[str, float]) -> None:
        """After an evaluation; ``metrics`` are named ``eval/...``."""

    def on_checkpoint(self, trainer: TrainerView, folder: str) -> None:
        """A checkpoint was written; an asynchronous one may still be being written."""

    def on_train_end(self, trainer: TrainerView) -> None:
        """The run has finished; not called after an error."""

    def on_error(self, trainer: TrainerView, error: BaseException) -> None:
        """The run is about to end with ``error``; no collectives here: other ranks may be gone."""

    def state_dict(self) -> Mapping[str, Any]:
        """State for a resumed run; saved with each checkpoint under the class name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
