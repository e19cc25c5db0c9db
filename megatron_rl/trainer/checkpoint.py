"""Checkpoints in Megatron-Core's distributed format, written atomically and resumed exactly.

A checkpoint is a folder ``<output_dir>/checkpoints/step_000040``: model and optimizer shards (`dist_checkpointing`, so
any layout can load what another wrote), and in its common part the step, data cursor, schedules and every counter that
seeds depend on. It is written under another name and renamed when complete; a killed run leaves no half checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.models.megatron_chunk import unwrap
from megatron_rl.models.write_results import use_own_results
from megatron_rl.parallel import ParallelContext
from megatron_rl.trainer.loop import TrainingLoop
from megatron_rl.trainer.optimizer_state import load_optimizer, prepare_for_checkpoint
from megatron_rl.trainer.retention import complete_checkpoints, record_newest, record_restored
from megatron_rl.workers.trainable import TrainableModel

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
METADATA = {  # copied for each call: Megatron-Core adds process groups of the moment
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


class Stateful(Protocol):
    """Anything whose small state travels in the common part of a checkpoint; equal on all ranks."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class DistributedCheckpoints:
    """Writes and restores the state of a run.

    Args:
        folder: where the checkpoints lie.
        models: the models in training by role; "actor" keeps Megatron's own parameter names, others are prefixed.
        states: other state by name.
        resume: as `TrainerSettings.resume`.
        keep_last: complete checkpoints to keep.
        asynchronous: write in a background process.
    """

    def __init__(
        self,
        folder: Path,
        context: ParallelContext,
        models: Mapping[str, TrainableModel],
        states: Mapping[str, Stateful],
        *,
        resume: str = "auto",
        keep_last: int = 2,
        asynchronous: bool = False,
        describe: Callable[[Path], None] | None = None,
    ) -> None:
        self.folder = folder
        self._describe = describe
        self.context = context
        self.models = models
        self.states = states
        self.resume = resume
        self.keep_last = keep_last
        self._queue = AsyncCallsQueue() if asynchronous else None

    # Saving

    def save(self, trainer: TrainingLoop) -> str:
        """Write the present step. Asynchronous writing returns at once; the folder appears when it is complete."""
        final = self.folder / f"step_{trainer.step:06d}"
        partial = final.with_name(final.name + PARTIAL)
        self.finish()
        if self.context.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._barrier()
        state = self._sharded_state(trainer, loading=False)
        use_own_results()
        request = dist_checkpointing.save(state, str(partial), async_sharded_save=self._queue is not None)
        if self._queue is None:
            self._complete(partial, final)
        else:
            assert isinstance(request, AsyncRequest)
            request.add_finalize_fn(lambda: self._complete(partial, final))
            self._queue.schedule_async_request(request)
        return str(final)

    def poll(self) -> None:
        """Complete background writes that are done; called once a step, collectively."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for background writes."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)

    def _complete(self, partial: Path, final: Path) -> None:
        self._barrier()
        if self.context.rank == 0:
            if self._describe is not None:
                self._describe(partial)
            replaced = final.with_name(f".{final.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            record_newest(self.folder, final.name)
            for old in complete_checkpoints(self.folder)[: -self.keep_last]:
                shutil.rmtree(old)
        self._barrier()
        logger.info("checkpoint %s is complete", final)

    # Restoring

    def restore(self, trainer: TrainingLoop) -> bool:
        """Load the checkpoint that ``resume`` asks for; False for a fresh start.

        Raises:
            ConfigError: the named checkpoint is absent, or ``resume=never`` in a folder that has checkpoints.
        """
        found = find_checkpoint(self.folder, self.resume)
        if found is None:
            return False
        common = dist_checkpointing.load_common_state_dict(str(found))
        for name in [*self.models, *self.states]:
            if name not in common["parts"]:
                raise ConfigError(
                    f"{found} holds {', '.join(common['parts'])}, but this run also has {name}: "
                    "resume with the configuration that wrote it, or give another output folder"
                )
        template = self._sharded_state(trainer, loading=True, with_rng=common["world_size"] == self.context.world_size)
        state = dist_checkpointing.load(template, str(found))
        for name, part in self.models.items():
            self._load_model(name, part, state)
        for name, stateful in self.states.items():
            stateful.load_state_dict(common["states"][name])
        trainer.load_state_dict(common["trainer"])
        if "rng" in state:
            set_rng_state(state["rng"])
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

    def _load_model(self, name: str, part: TrainableModel, state: Mapping[str, Any]) -> None:
        chunks = part.model.chunks
        for index, chunk in enumerate(chunks):
            unwrap(chunk).load_state_dict(state[_chunk_key(name, index, len(chunks))])
        counters = state[f"{name}_counters"]
        load_optimizer(name, part.optimizer, part.scheduler, state[f"{name}_optimizer"], counters["scheduler"])
        part.num_steps, part.num_updates = counters["num_steps"], counters["num_updates"]

    # The state itself

    def _sharded_state(self, trainer: TrainingLoop, loading: bool, with_rng: bool = True) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, part in self.models.items():
            state |= self._model_state(name, part, loading)
        if not loading:
            state |= {
                "trainer": trainer.state_dict(),
                "states": {name: dict(stateful.state_dict()) for name, stateful in self.states.items()},
                "parts": [*self.models, *self.states],
                "world_size": self.context.world_size,
                "layout": str(self.context.sizes),
            }
        if with_rng:
            shape, place = (self.context.world_size,), (self.context.rank,)
            state["rng"] = ShardedObject("rng", None if loading else rng_state(), shape, place)
        return state

    def _model_state(self, name: str, part: TrainableModel, loading: bool) -> dict[str, Any]:
        chunks = part.model.chunks
        part.model.sync_parameters()
        prefix = "" if name == "actor" else f"{name}."
        metadata = dict(METADATA)
        models = {
            _chunk_key(name, index, len(chunks)): unwrap(chunk).sharded_state_dict(prefix=prefix, metadata=metadata)
            for index, chunk in enumerate(chunks)
        }
        prepare_for_checkpoint(part.optimizer, loading)
        optimizer = part.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
        scheduler = part.scheduler.state_dict() if part.scheduler is not None else {}
        counters = {"num_steps": part.num_steps, "num_updates": part.num_updates, "scheduler": scheduler}
        return models | {f"{name}_optimizer": optimizer, f"{name}_counters": counters}

    def _barrier(self) -> None:
        torch.distributed.barrier(group=self.context.host_group)


def _chunk_key(name: str, index: int, count: int) -> str:
    return f"{name}_model{index}" if count > 1 else f"{name}_model"


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to start from.

    Raises:
        ConfigError: the named checkpoint is absent, or ``resume`` is "never" and ``folder`` has checkpoints.
    """
    existing = complete_checkpoints(folder)
    if resume == "never":
        if existing:
            raise ConfigError(
                f"{folder} already holds {existing[-1].name}, and resume=never: give another "
                "trainer.output_dir, or resume=auto to continue that run"
            )
        return None
    if resume == "auto":
        return existing[-1] if existing else None
    path = Path(resume)
    if not path.is_dir() and path.name == resume:
        path = folder / resume
    if not path.is_dir():
        raise ConfigError(
            f"trainer.resume={resume}: no such folder; expected auto, never, a checkpoint folder or its name "
            f"(known: {', '.join(str(p) for p in existing) or 'none'})"
        )
    return path


def rng_state() -> dict[str, Any]:
    """Every generator of this process, Megatron's tracker included."""
    state = current_platform().rng_state()
    return {"platform": state, "tracker": get_cuda_rng_tracker().get_states()}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    current_platform().set_rng_state(state["platform"])
    get_cuda_rng_tracker().set_states(state["tracker"])
