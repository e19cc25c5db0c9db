"""The training engine for whatever a role was given as its model, and what else depends on the backend."""

from __future__ import annotations

import functools
import logging
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.engines.engine_config import Backend, EngineConfig
from megatron_rl.engines.fsdp2.sizes import require_data_parallel
from megatron_rl.engines.megatron.build import build, max_positions
from megatron_rl.engines.megatron.checkpoint.storage import MegatronStorage
from megatron_rl.engines.megatron.model.builder import transformer_config
from megatron_rl.engines.shardless import built_by_training_ranks
from megatron_rl.engines.state_storage import StateStorage
from megatron_rl.models import Architecture
from megatron_rl.models.family import NoFamilyError
from megatron_rl.models.hf_config import best_architecture
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.weights.starting_model import family_architecture, hf_config_of, is_hf_model, resolved

logger = logging.getLogger(__name__)


def build_engine(
    model: Any,
    context: ParallelContext,
    config: EngineConfig,
    *,
    name: str,
    vocab: int = 0,
    optimizer: Any = None,
    scheduler: Any = None,
    value_model: bool = False,
    shared_value_head: bool = False,
    frozen: bool = False,
) -> TrainingEngine:
    """An engine for ``model``. Collective.

    Args:
        model: a ready `TrainingEngine`, used as it is; or a Hugging Face folder, id or model, a Megatron checkpoint,
            or a Megatron job's own model chunks.
        name: the role's, in errors.
        vocab: logical vocabulary of Megatron chunks, without padding; nothing else needs it.
        optimizer, scheduler: the job's own; None = made from ``config.optimizer``.
        value_model: its output is one number a position.
        shared_value_head: it gets a value head beside its output layer.
        frozen: it only scores: no gradient buffers, no optimizer.

    In a job with rollout ranks these get a `ShardlessEngine`.

    Raises:
        ConfigError: layout, model and settings do not fit together.
    """
    if isinstance(model, TrainingEngine):
        return _ready(model, name, value_model, optimizer)
    make = functools.partial(
        _build,
        model,
        context,
        config,
        name=name,
        vocab=vocab,
        optimizer=optimizer,
        scheduler=scheduler,
        value_model=value_model,
        shared_value_head=shared_value_head,
        frozen=frozen,
    )
    if context.split is None:
        return make()
    return built_by_training_ranks(make, context, context.split, name)


def _build(
    model: Any,
    context: ParallelContext,
    config: EngineConfig,
    *,
    name: str,
    vocab: int,
    scheduler: Any,
    **settings: Any,
) -> TrainingEngine:
    if choose_backend(model, config.backend, name) == "fsdp2":
        # At run time only: it imports all of transformers' modelling code, 2 CPU-seconds that most jobs do not need.
        from megatron_rl.engines.fsdp2 import build as fsdp2

        return fsdp2.build(model, context, config, name=name, **settings)
    return build(model, context, config, name=name, vocab=vocab, scheduler=scheduler, **settings)


def choose_backend(model: Any, wanted: Backend | None, name: str) -> Backend:
    """What trains ``model``: what is ``wanted``, or Megatron-Core where it is a family's model, or FSDP2.

    Raises:
        ConfigError: FSDP2 is wanted for a Megatron job's own chunks.
    """
    if not is_hf_model(model):
        if wanted == "fsdp2":
            raise ConfigError("backend fsdp2 trains Hugging Face models, but Megatron model chunks were given")
        return "megatron"
    if wanted is not None:
        return wanted
    try:
        family_architecture(resolved(model))
    except NoFamilyError as error:
        logger.info("%s: trained under FSDP2, data parallel only, since %s", name, str(error).split(":")[0])
        return "fsdp2"
    return "megatron"


def _ready(engine: TrainingEngine, name: str, value_model: bool, optimizer: Any) -> TrainingEngine:
    if optimizer is not None:
        raise ConfigError("an optimizer was given with a training engine, which has its own: leave it out")
    if engine.value_model != value_model:
        needed, found = ("a value head", "the vocabulary")[:: 1 if value_model else -1]
        raise ConfigError(f"{name} needs a model whose output layer is {needed}, but the engine's is {found}")
    engine.name = name
    return engine


def needs_vocab(model: Any) -> bool:
    """Whether the vocabulary size must be given: a Megatron job's own chunks know only the padded one."""
    return not (isinstance(model, TrainingEngine) or is_hf_model(model))


def size_of(model: Any, vocab: int) -> tuple[int, int]:
    """Vocabulary and longest sequence of what `build_engine` takes as ``model``, before it is built.

    Args:
        vocab: of the tokenizer; used for Megatron chunks, which know only their padded vocabulary.
    """
    if isinstance(model, TrainingEngine):
        return model.architecture.vocab, model.architecture.max_positions
    if is_hf_model(model):
        architecture = best_architecture(hf_config_of(resolved(model)))
        return architecture.vocab, architecture.max_positions
    chunks = list(model) if hasattr(model, "__len__") else [model]
    return vocab, max_positions(chunks)


def check_sizes(architecture: Architecture, sizes: ParallelSizes, wanted: Backend | None = None) -> None:
    """Raise ConfigError unless the backend, the ``wanted`` one if any, can split this architecture over these sizes."""
    if wanted == "fsdp2" or (wanted is None and isinstance(architecture, ModuleArchitecture)):
        require_data_parallel(sizes)
    else:
        transformer_config(architecture, sizes)


def build_storage(asynchronous: bool = False) -> StateStorage:
    """How the state of engines is written and read.

    Args:
        asynchronous: write in a background process.
    """
    return MegatronStorage(asynchronous)
