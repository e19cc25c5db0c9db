"""A Megatron model, its optimizer and its schedule as the sharded state that `dist_checkpointing` writes and any layout
can load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_rl.engines.megatron.model.model_chunk import unwrap
from megatron_rl.engines.megatron.optimizer_state import load_optimizer, prepare_for_checkpoint

METADATA = {  # copied for each call: Megatron-Core adds process groups to it
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def sharded_state(
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler | None,
    prefix: str,
    loading: bool,
) -> dict[str, Any]:
    """``model`` (``model0``, ``model1`` of several chunks), ``optimizer`` and ``counters``. Collective."""
    metadata = dict(METADATA)
    models = {
        key: unwrap(chunk).sharded_state_dict(prefix=prefix, metadata=metadata)
        for key, chunk in zip(chunk_keys(len(chunks)), chunks, strict=True)
    }
    prepare_for_checkpoint(optimizer, loading)
    state = optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    schedule = scheduler.state_dict() if scheduler is not None else {}
    return models | {"optimizer": state, "counters": {"scheduler": schedule}}


def load_sharded_state(
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler | None,
    name: str,
    state: Mapping[str, Any],
) -> None:
    """Restore what was loaded into `sharded_state`; ``name`` is the role's, in the log."""
    for key, chunk in zip(chunk_keys(len(chunks)), chunks, strict=True):
        unwrap(chunk).load_state_dict(state[key])
    load_optimizer(name, optimizer, scheduler, state["optimizer"], state["counters"]["scheduler"])


def chunk_keys(count: int) -> list[str]:
    return [f"model{index}" for index in range(count)] if count > 1 else ["model"]
