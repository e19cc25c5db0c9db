"""Where a role finds its place: the parallel context of the job that it belongs to."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.devices.hardware import warn_of_shared_store
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.parallel import ParallelContext, ParallelSizes


def running_context(seed: int) -> ParallelContext:
    """The context of the job that runs in this process; where none does yet, that of one model a rank."""
    return ParallelContext.current() or job_context(None, None, seed)


def job_context(parallel_state: Any, parallel: ParallelSizes | None, seed: int) -> ParallelContext:
    """The context of this process: around the job's ``parallel_state``, or a new one of the given sizes.

    Without torchrun the process is a world of one.
    """
    if parallel_state is not None:
        if parallel is not None:
            raise ConfigError("give parallel_state (sizes come from it) or parallel (it is initialised here), not both")
        warn_of_shared_store()
        return ParallelContext.from_parallel_state(parallel_state)
    if not dist.is_initialized():
        current_platform().init_process_group()
    return ParallelContext.create(parallel or ParallelSizes(), seed=seed)


def place_of(
    model: Any, context: ParallelContext | None, parallel_state: Any, parallel: ParallelSizes | None, seed: int
) -> ParallelContext:
    """The context of a role: that of its training engine, the given one, or as `job_context`."""
    if isinstance(model, TrainingEngine):
        return model.context
    return context or job_context(parallel_state, parallel, seed)


def check_share(share: tuple[int, int], context: ParallelContext) -> None:
    """``share``: (data-parallel rank, number of such ranks) that a loader cuts its batches for.

    Raises:
        ConfigError: this rank is another one: replicas would train on the same records.
    """
    place = (context.coordinates.dp, context.dp_size)
    if share != place:
        raise ConfigError(
            f"the loader was made for data-parallel rank {share[0]} of {share[1]}, but this is rank {place[0]} of "
            f"{place[1]}: give the actor to the loader, as in PromptLoader(dataset, batch_size, actor)"
        )
