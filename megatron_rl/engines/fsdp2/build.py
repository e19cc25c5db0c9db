"""Making an `FSDP2Engine` from a Hugging Face folder or model, or from a Megatron checkpoint."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.engines.base import Origin
from megatron_rl.engines.engine_config import DTYPES, EngineConfig
from megatron_rl.engines.fsdp2.attention import NAME, register
from megatron_rl.engines.fsdp2.engine import FSDP2Engine
from megatron_rl.engines.fsdp2.head import Head
from megatron_rl.engines.fsdp2.lora import add_adapters
from megatron_rl.engines.fsdp2.optimizer import ShardedOptimizer
from megatron_rl.engines.fsdp2.packing_proof import packs_exactly
from megatron_rl.engines.fsdp2.shard_layout import check_placements
from megatron_rl.engines.fsdp2.sharded_module import ShardedModule, without_dropout
from megatron_rl.engines.fsdp2.sizes import require_data_parallel
from megatron_rl.engines.fsdp2.starting_weights import fill_module, module_dtypes
from megatron_rl.engines.micro_batches import micro_batching
from megatron_rl.models import Architecture
from megatron_rl.models.family import NoFamilyError
from megatron_rl.models.hf_config import read_generation
from megatron_rl.models.hf_module import build_module, module_architecture, module_class_of
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.models.peft_adapters import PeftAdapters
from megatron_rl.parallel import ParallelContext
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_rl.weights.starting_model import family_architecture, hf_config_of, resolved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def build(
    model: Any,
    context: ParallelContext,
    config: EngineConfig,
    *,
    name: str,
    optimizer: Any = None,
    value_model: bool = False,
    shared_value_head: bool = False,
    frozen: bool = False,
) -> FSDP2Engine:
    """An engine from a Hugging Face folder, id or model. Arguments as for `engines.build.build_engine`. Collective.

    Raises:
        ConfigError: the layout has more than data parallelism, or model and settings do not fit together.
    """
    check_settings(context, config, optimizer)
    found = resolved(model)
    module, hf_config = _module(found, value_model)
    own = module_architecture(module, value_model)
    head = None if value_model else Head(module)
    sharded = ShardedModule(module, module.score if value_model else None)  # type: ignore[arg-type]
    if shared_value_head and not value_model:
        sharded.value_head = nn.Linear(module.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(sharded.value_head.weight)
    _enable_recompute(module, config.recompute)
    architecture = _architecture(found, value_model, own)
    adapters = {}
    if config.lora is not None and not frozen:
        given = PeftAdapters(config.lora.path, architecture) if config.lora.path else None
        adapters = add_adapters(module, sharded.layers, config.lora, config.seed, given)
    if frozen:
        sharded.requires_grad_(False)
    platform, reduce = current_platform(), torch.float32
    compute = DTYPES[config.dtype]
    if not config.optimizer.gradient_reduce_in_fp32:
        reduce = compute
    sharded.shard(context.dp_group, platform.device, compute, reduce)
    engine = FSDP2Engine(
        sharded=sharded,
        context=context,
        architecture=architecture,
        module_tensors=own.tensors,
        compute=compute,
        head=head,
        shared_value_head=sharded.value_head is not None,
        adapters=adapters,
        name=name,
    )
    check_placements(engine.parameters(), engine.layout, context.rank)
    complete = fill_module(engine, found, own)
    generation = read_generation(found.hf_folder if isinstance(found, MegatronCheckpoint) else found)
    engine.origin = Origin(hf_config, generation, module_dtypes(found, own), lacks_value_head=not complete)
    engine.can_pack = packs_exactly(engine) and config.packing is not False  # the first may choose eager attention
    remedy = f"{type(module).__name__} does not keep packed sequences apart: set packing=false"
    engine.micro_batching = micro_batching(config, engine.packs, remedy)
    if not frozen:
        trained = {name: weight for name, weight in engine.parameters().items() if weight.requires_grad}
        engine.optimizer = ShardedOptimizer(trained, config.optimizer)
    return engine


def _architecture(source: Any, value_model: bool, own: ModuleArchitecture) -> Architecture:
    """The family's where the model is exactly one of a family: rollout engines then hold it in SGLang's layout."""
    try:
        return family_architecture(source, value_model)
    except NoFamilyError:
        return own


def check_settings(context: ParallelContext, config: EngineConfig, optimizer: Any) -> None:
    """Raise ConfigError for what FSDP2 has not."""
    require_data_parallel(context.sizes)
    if config.dtype == "float16":
        raise ConfigError("backend fsdp2 has no loss scaling, which dtype=float16 needs: set dtype=bfloat16")
    if optimizer is not None:
        raise ConfigError("backend fsdp2 makes its own optimizer, since it cuts the weights: leave optimizer out")
    if config.collectives.all_reduce == "hybrid":
        raise ConfigError("backend fsdp2 reduces gradients itself: set collectives.all_reduce to its default")


def _module(source: Path | PreTrainedModel | MegatronCheckpoint, value_model: bool) -> tuple[PreTrainedModel, Any]:
    """The module on the CPU, in fp32, and the config that is exported. A model in memory is copied, whatever its class;
    another is built without taking memory for its weights."""
    hf_config = hf_config_of(source)
    given = None if isinstance(source, (Path, MegatronCheckpoint)) else source
    if given is not None and (not value_model or hasattr(given, "score")):
        module = copy.deepcopy(given).float()
        _log_dropout(without_dropout(module.config), hf_config)
        for part in module.modules():
            without_dropout(part)
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    else:
        built = copy.deepcopy(hf_config)
        if value_model:
            built.num_labels = 1
        _log_dropout(without_dropout(built), hf_config)
        module = build_module(built, module_class_of(built, value_model), torch.float32)
    if value_model and not isinstance(getattr(module, "score", None), nn.Linear):
        raise ConfigError(f"{type(module).__name__} has no linear layer `score`, which critics and reward models have")
    if _may_pack(module):
        register()
        module.set_attn_implementation(NAME)
    return module, hf_config


def _log_dropout(found: list[str], config: Any) -> None:
    if found:
        logger.info(
            "%s has %s: set to 0, so that log-probabilities of two passes can be compared",
            config.model_type,
            ", ".join(found),
        )


def _may_pack(module: PreTrainedModel) -> bool:
    """Whether nothing but attention, which calls a function of ours, carries values from one position to another."""
    config: Any = module.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    convolves = any(isinstance(part, (nn.Conv1d, nn.modules.rnn.RNNBase)) for part in module.modules())
    return module._supports_attention_backend and kinds <= {"full_attention", "sliding_attention"} and not convolves


def _enable_recompute(module: PreTrainedModel, recompute: bool) -> None:
    if not recompute:
        return
    if not module.supports_gradient_checkpointing:
        raise ConfigError(f"recompute=true, but {type(module).__name__} cannot recompute its layers: set it to false")
    module.gradient_checkpointing_enable({"use_reentrant": False})
