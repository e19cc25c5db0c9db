"""Which `ParallelContext` a role uses: that of the running job, a given one, or a new one."""

from __future__ import annotations

from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.devices.hardware import warn_of_shared_store
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.parallel import ParallelContext, ParallelSizes


def running_context(seed: int) -> ParallelContext:
    """The context of the job in this process; if there is none yet, a new one with data parallelism only."""
    return ParallelContext.current() or job_context(None, None, seed)


def job_context(parallel_state: Any, parallel: ParallelSizes | None, seed: int) -> ParallelContext:
    """The context of this process: around the job's ``parallel_state``, or a new one of the given sizes.

    Without torchrun the world has one rank.
    """
    if parallel_state is not None:
        if parallel is not None:
            raise ConfigError("give parallel_state (sizes come from it) or parallel (it is initialised here), not both")
        warn_of_shared_store()
        return ParallelContext.from_parallel_state(parallel_state)
    return ParallelContext.create(parallel or ParallelSizes(), seed=seed)


def role_context(
    model: Any, context: ParallelContext | None, parallel_state: Any, parallel: ParallelSizes | None, seed: int
) -> ParallelContext:
    """The context of a role: its training engine's, the given one, or that of `job_context`."""
    if isinstance(model, TrainingEngine):
        return model.context
    return context or job_context(parallel_state, parallel, seed)


def check_share(share: tuple[int, int], context: ParallelContext) -> None:
    """Check the (data-parallel rank, data-parallel size) that a loader was made for.

    Raises:
        ConfigError: they are not this rank's: replicas would train on the same records.
    """
    own = (context.coordinates.dp, context.dp_size)
    if share != own:
        raise ConfigError(
            f"the loader was made for data-parallel rank {share[0]} of {share[1]}, but this is rank {own[0]} of "
            f"{own[1]}: give the actor to the loader, as in PromptLoader(dataset, batch_size, actor)"
        )
