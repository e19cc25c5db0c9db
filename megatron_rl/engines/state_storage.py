"""`StateStorage`: how a run's state gets to disk and back, for the trainer, which knows no backend.

The state is a dict: what `TrainingEngine.state` returned for each model, with plain values beside it that are equal on
all ranks. `engines.build.build_storage` makes one.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rl.parallel import ParallelContext


class WriteError(RuntimeError):
    """A rank could not write its part; the message, of one line, is the same on every rank."""


class StateStorage(abc.ABC):
    """Writes and reads state. All methods but the last three are collective over the job's ranks."""

    @abc.abstractmethod
    def save(
        self,
        state: dict[str, Any],
        folder: Path,
        describe: Callable[[Path], object] | None,
        publish: Callable[[], object],
        published: Callable[[], object],
    ) -> None:
        """Write ``state`` into ``folder``, or begin to where writing goes on in the background (`poll`).

        Args:
            describe: on rank 0: adds to the folder what else belongs in it.
            publish: on rank 0, when all is written: gives the folder its name.
            published: on every rank, after that.

        Raises:
            WriteError: on every rank, what could not be written on one.
        """

    @abc.abstractmethod
    def poll(self, wait: bool) -> None:
        """Complete a save in the background that every rank has written, or wait for it. Raises WriteError."""

    @abc.abstractmethod
    def load(self, template: dict[str, Any], folder: Path) -> dict[str, Any]:
        """What ``folder`` holds for ``template``, a state made with ``loading=True``."""

    @abc.abstractmethod
    def load_common(self, folder: Path) -> dict[str, Any]:
        """The plain values of a state, which need no template."""

    @abc.abstractmethod
    def per_rank(self, key: str, value: Any, context: ParallelContext) -> Any:
        """A value that each rank stores for itself, as an entry of a state; ``None`` in a template."""

    @abc.abstractmethod
    def rng_state(self) -> dict[str, Any]:
        """Every random generator of this process."""

    @abc.abstractmethod
    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `rng_state` returned."""
