"""Making a `MegatronEngine`: around a Megatron job's own chunks and optimizer, or from a Hugging Face model.

Frozen or in training: `build` is the one path for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.engines.base import MicroBatching, Origin
from megatron_rl.engines.engine_config import DTYPES, EngineConfig, LoraConfig
from megatron_rl.engines.megatron.adopted_architecture import architecture_of_chunk, own_experts
from megatron_rl.engines.megatron.adopted_optimizer import (
    as_megatron,
    ddp_config_of,
    require_fitting,
    require_scheduler,
)
from megatron_rl.engines.megatron.adoption import (
    check_parameters,
    check_place,
    log_auxiliary_losses,
    warn_of_dropout,
)
from megatron_rl.engines.megatron.engine import MegatronEngine
from megatron_rl.engines.megatron.gradient_groups import use_hybrid_groups
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.engines.megatron.model.lora import add_adapters
from megatron_rl.engines.megatron.model.lora_adapter import LoraAdapter
from megatron_rl.engines.megatron.model.lora_places import LAYERS
from megatron_rl.engines.megatron.model.model_chunk import unwrap
from megatron_rl.engines.megatron.model_proof import prove
from megatron_rl.engines.megatron.optimizer import (
    build_optimizer,
    build_scheduler,
    experts_reduced_as_dense,
    wrap_data_parallel,
)
from megatron_rl.engines.megatron.starting_weights import fill_model
from megatron_rl.engines.micro_batches import micro_batching
from megatron_rl.models.family import describe
from megatron_rl.models.hf_config import architecture_from_hf, read_generation
from megatron_rl.models.peft_adapters import PeftAdapters
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.models.starting_adapters import StartingAdapters
from megatron_rl.parallel import ParallelContext
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_rl.weights.starting_model import hf_config_of, is_hf_model, resolved, stored_dtypes

if TYPE_CHECKING:
    from megatron_rl.models.hf_config import HFModel


def build(
    model: Any,
    context: ParallelContext,
    config: EngineConfig,
    *,
    vocab: int,
    name: str,
    optimizer: Any = None,
    scheduler: Any = None,
    value_model: bool = False,
    shared_value_head: bool = False,
    frozen: bool = False,
) -> MegatronEngine:
    """An engine from chunks or from a Hugging Face model. Arguments as for `engines.build.build_engine`.

    Raises:
        ConfigError: the optimizer does not train these chunks or does not fit how they are wrapped (see
            `adopted_optimizer`), or came with a Hugging Face model or LoRA; LoRA with wrapped chunks.
    """
    _require_alone(model, config, optimizer)
    if is_hf_model(model):
        engine = from_hf(
            model,
            context,
            dtype=DTYPES[config.dtype],
            recompute=config.recompute,
            value_model=value_model,
            shared_value_head=shared_value_head and not value_model,
            single_experts=config.lora is not None,
        )
    else:
        chunks = list(model) if isinstance(model, (list, tuple, torch.nn.ModuleList)) else [model]
        engine = from_chunks(chunks, context, vocab, value_model)
        if config.compare_with_export:
            prove(engine, packing=engine.packs and config.packing is not False)
    engine.name = name
    engine.micro_batching = _micro_batching(engine, config)
    if frozen:
        for chunk in engine.chunks:
            chunk.requires_grad_(False)
    else:
        _make_trainable(engine, config, optimizer, scheduler)
    return engine


def from_hf(
    source: str | Path | HFModel | MegatronCheckpoint,
    context: ParallelContext,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    value_model: bool = False,
    shared_value_head: bool = False,
    single_experts: bool = False,
) -> MegatronEngine:
    """Build the model in this job's layout and fill it from a Hugging Face folder, an in-memory model or a Megatron
    checkpoint of any layout. The engine has no optimizer yet.

    From files each rank reads only its own part. A value head is that of a sequence classifier with one label, or the
    one that a policy was saved with, and zero where the source has none (`Origin.lacks_value_head`).

    Args:
        single_experts: each expert has linear layers of its own, as adapters need, also where TransformerEngine could
            compute those of a rank in one call.
    """
    found = resolved(source)
    hf_config = hf_config_of(found)
    architecture, sizes = replace(architecture_from_hf(hf_config), value_model=value_model), context.sizes
    options = {"moe_grouped_gemm": False} if single_experts else {}
    config = transformer_config(architecture, sizes, dtype=dtype, recompute=recompute, **options)
    chunks = build_model(
        architecture,
        config,
        pg_collection=context.collection,
        device=current_platform().device,
        value_head=value_model,
        shared_value_head=shared_value_head,
    )
    vocab = padded_vocab(architecture.vocab, sizes.tp)
    engine = MegatronEngine(list(chunks), context, architecture, vocab, shared_value_head=shared_value_head)
    generation = read_generation(found.hf_folder if isinstance(found, MegatronCheckpoint) else found)
    stored = stored_dtypes(found)
    engine.origin = Origin(hf_config, generation, stored, lacks_value_head=not fill_model(engine, found))
    return engine


def from_chunks(
    chunks: Sequence[torch.nn.Module], context: ParallelContext, vocab: int, value_model: bool = False
) -> MegatronEngine:
    """Adopt a job's own `GPTModel` or `HybridModel` chunks, wrapped or not. The engine has no optimizer yet.

    Args:
        vocab: logical vocabulary, without padding: usually ``len(tokenizer)``.
        value_model: the last chunk's output layer is a `ValueHead`.

    Raises:
        ConfigError: on every rank: the chunks compute what no supported decoder does, or do not hold the layers that
            their place in the pipeline asks for, or not that head.
    """
    inner = [unwrap(chunk) for chunk in chunks]
    experts = next((found for found in context.gather_objects(own_experts(inner)) if found is not None), None)
    with context.attempt("taking over the model"):
        check_place(inner, context, value_model)
        architecture = replace(architecture_of_chunk(inner[0], vocab, experts), value_model=value_model)
        for other in inner[1:]:
            architecture_of_chunk(other, vocab, experts)
        engine = MegatronEngine(list(chunks), context, architecture, int(inner[0].vocab_size))
        engine.check_layers()
        check_parameters(engine.layout, context.rank, engine.tensors())
    warn_of_dropout(engine.config)
    log_auxiliary_losses(engine.config)
    return engine


def max_positions(chunks: Sequence[torch.nn.Module]) -> int:
    """Longest sequence that a job's own chunks accept."""
    return int(unwrap(chunks[0]).max_sequence_length)  # type: ignore[arg-type]


def _require_alone(model: Any, config: EngineConfig, optimizer: Any) -> None:
    if optimizer is not None and is_hf_model(model):
        raise ConfigError(
            "an optimizer was given with a Hugging Face model, but it cannot know the weights that are made here: "
            "leave it out, or give Megatron model chunks"
        )
    if optimizer is not None and config.lora is not None:
        raise ConfigError(
            "LoRA was asked for with an optimizer, which cannot know the adapters that are made here: leave one out"
        )


def _make_trainable(engine: MegatronEngine, config: EngineConfig, optimizer: Any, scheduler: Any) -> None:
    """Add adapters, data parallelism, optimizer and schedule where the job has none of its own."""
    context, optimizer_config = engine.context, config.optimizer
    if config.lora is not None:
        engine.adapters = _adapters(engine, config.lora, config.seed)
    wrapped = ddp_config_of(engine.chunks) is not None
    if optimizer is not None:
        require_fitting(optimizer, engine.chunks, context)
    require_scheduler(scheduler, optimizer)
    if wrapped and experts_reduced_as_dense(engine.chunks):
        raise ConfigError(
            f"experts with tp={context.sizes.tp}, etp={context.sizes.etp} and ep=1: Megatron-Core does not sum their "
            "gradients over the tensor-parallel ranks, which have other tokens: set etp to tp, ep above 1, or set "
            "allreduce=False on the experts' parameters before DistributedDataParallel wraps them"
        )
    if not wrapped:
        whole = optimizer_config if optimizer is None else optimizer_config.model_copy(update={"distributed": False})
        engine.chunks = list(wrap_data_parallel(engine.chunks, whole))
    if config.collectives.all_reduce == "hybrid":
        use_hybrid_groups(engine.chunks, context, config.collectives)
    if optimizer is None:
        engine.optimizer = build_optimizer(engine.chunks, optimizer_config)  # type: ignore[arg-type]
        engine.scheduler = build_scheduler(engine.optimizer, optimizer_config)
    else:
        engine.optimizer = as_megatron(optimizer, engine.chunks, context, optimizer_config)
        engine.scheduler = scheduler


def _adapters(engine: MegatronEngine, lora: LoraConfig, seed: int) -> dict[str, LoraAdapter]:
    if lora.path is None:
        return add_adapters(engine.chunks, lora, seed)
    with engine.context.attempt("reading adapters"):
        found = PeftAdapters(lora.path, engine.architecture)
        starting = StartingAdapters(found, engine.architecture, LAYERS)
        return add_adapters(engine.chunks, lora, seed, starting, engine.layout.shards(engine.context.rank))


def _micro_batching(engine: MegatronEngine, config: EngineConfig) -> MicroBatching:
    a = engine.architecture
    switches = [switch for layer in describe(a).layers if (switch := layer.attention.rotary.switch) is not None]
    if config.packing is False and switches and a.max_positions > min(switches):
        raise ConfigError(
            f"packing=false, but this model turns sequences of more than {min(switches)} tokens by other frequencies "
            "(LongRoPE), and padding would make short sequences long ones: set packing=true"
        )
    remedy = (
        "this model's core attention does not take packed sequences: set packing=false, or build the model with "
        "megatron_rl.engines.megatron.model.layer_spec"
    )
    return micro_batching(config, engine.packs, remedy)
