"""Putting a worker together: the job's parallel context, the model, its optimizer and its micro-batches.

One path for both ways in: a Megatron job's own chunks and optimizer, or a Hugging Face model that is built here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as megatron_state

from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.devices.hardware import warn_of_shared_store
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers.adopted_optimizer import as_megatron, ddp_config_of, require_fitting, require_scheduler
from megatron_rl.workers.gradient_groups import use_hybrid_groups
from megatron_rl.workers.megatron_model import MegatronModel
from megatron_rl.workers.model_proof import prove
from megatron_rl.workers.optimizer import (
    build_optimizer,
    build_scheduler,
    experts_reduced_as_dense,
    wrap_data_parallel,
)
from megatron_rl.workers.schedule import MicroBatching
from megatron_rl.workers.scoring import ScoringModel
from megatron_rl.workers.settings import DTYPES, WorkerSettings
from megatron_rl.workers.starting_weights import is_hf_model
from megatron_rl.workers.trainable import TrainableModel


def running_context(seed: int) -> ParallelContext:
    """The context of the job that runs in this process; where none does yet, that of one model a rank."""
    if megatron_state.model_parallel_is_initialized():
        return ParallelContext.from_parallel_state(megatron_state)
    return job_context(None, None, seed)


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


def assemble(
    model: Any,
    context: ParallelContext,
    settings: WorkerSettings,
    *,
    vocab: int,
    name: str,
    optimizer: Any = None,
    scheduler: Any = None,
    value_head: bool = False,
) -> TrainableModel:
    """A trainable model from either way in.

    Raises:
        ConfigError: the optimizer does not train these chunks or does not fit how they are wrapped (see
            `adopted_optimizer`), or came with a Hugging Face model or LoRA; LoRA with wrapped chunks.
    """
    if is_hf_model(model) and optimizer is not None:
        raise ConfigError(
            "an optimizer was given with a Hugging Face model, but it cannot know the weights that are made here: "
            "leave it out, or give Megatron model chunks"
        )
    if settings.lora is not None and optimizer is not None:
        raise ConfigError(
            "LoRA was asked for with an optimizer, which cannot know the adapters that are made here: leave one out"
        )
    held = hold(model, context, settings, vocab, value_head)
    if settings.lora is not None:
        held.add_lora(settings.lora, settings.seed)
    wrapped = ddp_config_of(held.chunks) is not None
    if optimizer is not None:
        require_fitting(optimizer, held.chunks, context)
    require_scheduler(scheduler, optimizer)
    if wrapped and experts_reduced_as_dense(held.chunks):
        raise ConfigError(
            f"experts with tp={context.sizes.tp}, etp={context.sizes.etp} and ep=1: Megatron-Core does not sum their "
            "gradients over the tensor-parallel ranks, which have other tokens: set etp to tp, ep above 1, or set "
            "allreduce=False on the experts' parameters before DistributedDataParallel wraps them"
        )
    if not wrapped:
        whole = (
            settings.optimizer if optimizer is None else settings.optimizer.model_copy(update={"distributed": False})
        )
        held.chunks = list(wrap_data_parallel(held.chunks, whole))
    if settings.collectives.all_reduce == "hybrid":
        use_hybrid_groups(held.chunks, context, settings.collectives)
    if optimizer is None:
        optimizer = build_optimizer(held.chunks, settings.optimizer)  # type: ignore[arg-type]
        scheduler = build_scheduler(optimizer, settings.optimizer)
    else:
        optimizer = as_megatron(optimizer, held.chunks, context, settings.optimizer)
    return TrainableModel(held, _micro_batching(held, settings), optimizer, scheduler, name)


def build_frozen(
    model: Any, context: ParallelContext, settings: WorkerSettings, vocab: int, value_head: bool = False
) -> ScoringModel:
    """A model that only scores: no gradient buffers, no optimizer."""
    held = hold(model, context, settings, vocab, value_head)
    for chunk in held.chunks:
        chunk.requires_grad_(False)
    return ScoringModel(held, _micro_batching(held, settings))


def hold(
    model: Any, context: ParallelContext, settings: WorkerSettings, vocab: int, value_head: bool = False
) -> MegatronModel:
    """Either way in, without an optimizer."""
    if not is_hf_model(model):
        chunks = list(model) if isinstance(model, (list, tuple, torch.nn.ModuleList)) else [model]
        taken = MegatronModel.from_chunks(chunks, context, vocab, value_head)
        if settings.compare_with_export:
            prove(taken, packing=taken.packs and settings.packing is not False)
        return taken
    dtype = DTYPES[settings.dtype]
    return MegatronModel.from_hf(
        model,
        context,
        dtype=dtype,
        recompute=settings.recompute,
        value_head=value_head,
        second_head=settings.value_head and not value_head,
    )


def _micro_batching(model: MegatronModel, settings: WorkerSettings) -> MicroBatching:
    if settings.packing and not model.packs:
        raise ConfigError(
            "packing=true, but this model's core attention does not take packed sequences: set "
            "packing=false, or build the model with megatron_rl.models.layer_spec"
        )
    packing = model.packs if settings.packing is None else settings.packing
    return MicroBatching(settings.token_budget, packing, settings.micro_batch_size)
