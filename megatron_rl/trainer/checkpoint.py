"""Checkpoints in Megatron-Core's distributed format, written atomically and resumed exactly.

A checkpoint is a folder ``<output_dir>/checkpoints/step_000040``: model and optimizer shards (`dist_checkpointing`, so
any layout can load what another wrote), and in its common part the step, data cursor, schedules and every counter that
seeds depend on. It is written under another name and renamed when complete; a killed run leaves no half checkpoint.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from megatron_rl.config import ConfigError
from megatron_rl.engines.build import build_storage
from megatron_rl.parallel import ParallelContext
from megatron_rl.trainer.loop import TrainingLoop
from megatron_rl.trainer.restart_point import CheckpointError, attempt_write, find_checkpoint, intact_checkpoint
from megatron_rl.trainer.retention import complete_checkpoints, record_newest, record_restored
from megatron_rl.workers.trained_worker import TrainedWorker

logger = logging.getLogger(__name__)

PARTIAL = ".partial"


class Stateful(Protocol):
    """Anything whose small state is saved in the common part of a checkpoint; equal on all ranks."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class StepStart(NamedTuple):
    """The state at the beginning of a step, of everything that a step changes before it changes weights."""

    state: dict[str, Any]  # of the loop and of other parts: the common part of a checkpoint
    rng: dict[str, Any]
    num_updates: tuple[int, ...]  # of each model: tells whether weights have changed since


class DistributedCheckpoints:
    """Writes and restores the state of a run.

    Args:
        folder: of all checkpoints of the run.
        models: the roles in training; "actor" keeps Megatron's own parameter names, others are prefixed.
        states: other state by name.
        resume: as `TrainerConfig.resume`.
        keep_last: complete checkpoints to keep.
        asynchronous: write in a background process.
        describe: writes the description of the model into a checkpoint's folder; called on rank 0.
        verify: compare a checkpoint's files with their digests before it is restored.
    """

    def __init__(
        self,
        folder: Path,
        context: ParallelContext,
        models: Mapping[str, TrainedWorker],
        states: Mapping[str, Stateful],
        *,
        resume: str = "auto",
        keep_last: int = 2,
        asynchronous: bool = False,
        describe: Callable[[Path], None] | None = None,
        verify: bool = True,
    ) -> None:
        self.folder = folder
        self._describe = describe
        self.context = context
        self.models = models
        self.states = states
        self.resume = resume
        self.keep_last = keep_last
        self.verify = verify
        self._before: StepStart | None = None  # during a step
        self._writing: tuple[Path, Path] | None = None  # what the background process writes: its name, and its folder
        self._asynchronous = asynchronous
        self._storage = build_storage(asynchronous)

    # Saving

    def save(self, trainer: TrainingLoop) -> str:
        """Write the present step. Asynchronous writing returns at once; the folder appears when it is complete.

        In a step that was given up it is the state before that step.

        Raises:
            CheckpointError: on every rank: the disk is full, or fails; also from `poll` and `finish`. Or the step that
                was given up has changed weights already.
        """
        if self._before is not None and self._before.num_updates != self._num_updates():
            raise CheckpointError(
                f"step {trainer.step + 1} was given up after its weights had changed: neither it nor the state before "
                "it can be saved; the newest checkpoint stands"
            )
        final = self.folder / f"step_{trainer.step:06d}"
        partial = final.with_name(final.name + PARTIAL)
        self.finish()
        if self.context.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self._barrier()
        attempt_write(lambda: self._write(trainer, partial, final), final, partial, self.context)
        return str(final)

    def remember(self, trainer: TrainingLoop) -> None:
        """Keep what a step changes before its optimizer step: cursor, counters, generators."""
        self._before = StepStart(self._small_state(trainer), self._storage.rng_state(), self._num_updates())

    def forget(self) -> None:
        """The step is complete: `save` writes the present state again."""
        self._before = None

    def _num_updates(self) -> tuple[int, ...]:
        return tuple(part.num_updates for part in self.models.values())

    def _small_state(self, trainer: TrainingLoop) -> dict[str, Any]:
        states = {name: dict(stateful.state_dict()) for name, stateful in self.states.items()}
        return copy.deepcopy({"trainer": trainer.state_dict(), "states": states})

    def poll(self) -> None:
        """Complete background writes that are done; called once a step, collectively."""
        self._complete_background(wait=False)

    def finish(self) -> None:
        """Wait for background writes."""
        self._complete_background(wait=True)

    def _complete_background(self, wait: bool) -> None:
        if self._writing is not None:
            attempt_write(lambda: self._storage.poll(wait), *self._writing, self.context)

    def _write(self, trainer: TrainingLoop, partial: Path, final: Path) -> None:
        def published() -> None:
            self._writing = None
            logger.info("checkpoint %s is complete", final)

        state = self._sharded_state(trainer, loading=False)
        self._storage.save(state, partial, self._describe, lambda: self._publish(partial, final), published)
        if self._asynchronous:
            self._writing = final, partial

    def _publish(self, partial: Path, final: Path) -> None:
        """Rename to the final name and delete the oldest. The order is written first: the disk may be full."""
        replaced = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        try:
            record_newest(self.folder, final.name)
            partial.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        for old in complete_checkpoints(self.folder)[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)  # what could not be deleted is deleted the next time

    # Restoring

    def restore(self, trainer: TrainingLoop) -> bool:
        """Load the checkpoint that ``resume`` asks for; False for a fresh start.

        Raises:
            ConfigError: the named checkpoint does not exist, or ``resume=never`` in a folder that has checkpoints.
            CheckpointError: it is damaged, and there is no other to continue from; see `intact_checkpoint`.
        """
        if self.verify:
            found = intact_checkpoint(self.folder, self.resume, self.context)
        else:
            found = find_checkpoint(self.folder, self.resume)
        if self.context.rank == 0:
            for left in self.folder.glob(f"step_*{PARTIAL}"):  # by a run that was killed while it wrote
                shutil.rmtree(left, ignore_errors=True)
        if found is None:
            return False
        common = self._storage.load_common(found)
        for name in [*self.models, *self.states]:
            if name not in common["parts"]:
                raise ConfigError(
                    f"{found} holds {', '.join(common['parts'])}, but this run also has {name}: "
                    "resume with the configuration that wrote it, or give another output folder"
                )
        for name, part in self.models.items():
            written, kind = common[f"{name}_counters"].get("engine", part.engine.kind), part.engine.kind
            if written != kind:
                raise ConfigError(
                    f"{found} holds the state of {name} in a {written} engine, but this run's is {kind}: resume with "
                    f"backend={written}, or start another run from its weights (model={found})"
                )
        template = self._sharded_state(trainer, loading=True, with_rng=common["world_size"] == self.context.world_size)
        state = self._storage.load(template, found)
        for name, part in self.models.items():
            part.load_state(
                {key.removeprefix(f"{name}_"): state[key] for key in template if key.startswith(f"{name}_")}
            )
        for name, stateful in self.states.items():
            stateful.load_state_dict(common["states"][name])
        trainer.load_state_dict(common["trainer"])
        if "rng" in state:
            self._storage.set_rng_state(state["rng"])
        else:
            logger.warning(
                "written by %d ranks, resumed by %d: generators start afresh",
                common["world_size"],
                self.context.world_size,
            )
        if self.context.rank == 0:
            record_restored(self.folder, found)
        logger.info("restored %s", found)
        return True

    # The state itself

    def _sharded_state(self, trainer: TrainingLoop, loading: bool, with_rng: bool = True) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, part in self.models.items():
            own = part.state("" if name == "actor" else f"{name}.", loading)
            state |= {f"{name}_{key}": value for key, value in own.items()}
        if not loading:
            before = self._before
            state |= self._small_state(trainer) if before is None else before.state
            state |= {
                "parts": [*self.models, *self.states],
                "world_size": self.context.world_size,
                "layout": str(self.context.sizes),
            }
        if with_rng:
            state["rng"] = self._storage.per_rank("rng", None if loading else self._rng(), self.context)
        return state

    def _rng(self) -> dict[str, Any]:
        return self._storage.rng_state() if self._before is None else self._before.rng

    def _barrier(self) -> None:
        torch.distributed.barrier(group=self.context.host_group)
