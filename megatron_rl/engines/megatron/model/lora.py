"""LoRA: a model whose own weights are frozen, with a trained `LoraAdapter` on each of the chosen linear layers.

adapters = add_adapters(chunks, LoraConfig(rank=16, alpha=32), seed=0)      # before DDP and the optimizer are built

Frozen weights have no gradient buffers and no optimizer state; value heads are trained whole. Each layer keeps its
class, its parameters and their names: an adapter stands beside it and is added by a forward hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import LoraConfig, Target
from megatron_rl.engines.megatron.model.lora_adapter import AdaptedLayer, LoraAdapter
from megatron_rl.engines.megatron.model.model_chunk import unwrap
from megatron_rl.engines.megatron.model.value_head import ValueHead
from megatron_rl.models.lora_update import SUFFIX
from megatron_rl.models.naming import chunk_prefix
from megatron_rl.ops.rms_norm import rms_norm

PARENTS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}
ROW_PARALLEL = ("linear_proj", "linear_fc2")


class _Place(NamedTuple):
    """Where an adapter goes."""

    shard: str  # name of the layer's weight, as layouts name it
    name: str  # of the layer in the whole model
    target: Target
    parent: nn.Module
    tp_group: Any


def add_adapters(chunks: Sequence[nn.Module], lora: LoraConfig, seed: int) -> dict[str, LoraAdapter]:
    """Freeze a rank's bare chunks and add adapters: name of the adapted weight (as layouts name it) -> its adapter.

    Args:
        seed: of the initial values, which depend on nothing else but the layer's name.

    Raises:
        ConfigError: the chunks are wrapped already, have no such layer, or it is one of experts.
    """
    if any(hasattr(chunk, "ddp_config") for chunk in chunks):
        raise ConfigError(
            "LoRA was asked for with model chunks that are wrapped in DistributedDataParallel: its gradient buffers "
            "hold the whole model's already. Give bare chunks without an optimizer, and both are made here"
        )
    if not lora.target_modules:
        raise ConfigError(f"lora.target_modules is empty: choose some of {', '.join(PARENTS)}")
    _refuse_experts(unwrap(chunks[0]).config, lora)
    places = [place for index, chunk in enumerate(chunks) for place in _places(chunk, index, len(chunks), lora)]
    for chunk in chunks:
        _freeze(unwrap(chunk))
    return {place.shard: _add(place, lora, seed) for place in places}


def _refuse_experts(config: Any, lora: LoraConfig) -> None:
    """Raises on every rank, whichever layers it holds."""
    given = [target for target in lora.target_modules if PARENTS[target] == "mlp"]
    if config.num_moe_experts and given:
        raise ConfigError(
            f"lora.target_modules has {' and '.join(given)}, but the model is a mixture of experts, whose experts take "
            "no adapters: choose linear_qkv and linear_proj"
        )


def _places(chunk: nn.Module, index: int, num_chunks: int, lora: LoraConfig) -> Iterator[_Place]:
    model = unwrap(chunk)
    for local, layer in enumerate(model.decoder.layers):
        for target in dict.fromkeys(lora.target_modules):
            parent = getattr(layer, PARENTS[target])
            within = f"{PARENTS[target]}.{target}"
            _check(parent, target, f"layer {layer.layer_number - 1}")
            shard = f"{chunk_prefix(index, num_chunks)}decoder.layers.{local}.{within}.weight"
            name = f"decoder.layers.{layer.layer_number - 1}.{within}"
            yield _Place(shard, name, target, parent, model.pg_collection.tp)


def _check(parent: nn.Module, target: Target, where: str) -> None:
    layer = parent._modules.get(target)
    if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        raise ConfigError(
            f"lora.target_modules has {target}, but {where} has no such linear layer: its "
            f"{type(parent).__name__} has {', '.join(parent._modules)}"
        )


def _freeze(model: Any) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ValueHead):
            module.requires_grad_(True)
    if model.pre_process and model.config.recompute_granularity is not None:
        # Recomputed layers give no gradients unless one of their inputs requires one, and the embedding is frozen.
        model.embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _add(place: _Place, lora: LoraConfig, seed: int) -> LoraAdapter:
    layer = getattr(place.parent, place.target)
    config: Any = place.parent.config
    gated = place.target == "linear_fc1" and bool(config.gated_linear_unit)
    adapted = AdaptedLayer(place.name, layer.weight, place.target in ROW_PARALLEL, gated)
    adapter = LoraAdapter(
        config,
        adapted,
        place.tp_group,
        rank=lora.rank,
        scale=lora.alpha / lora.rank,
        dropout=lora.dropout,
        seed=seed,
    )
    place.parent.add_module(place.target + SUFFIX, adapter)
    seen = _input_of(layer, config, place.name)

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not adapter.enabled:
            return None
        value, *rest = output
        return (value + adapter(seen(inputs[0])), *rest)

    layer.register_forward_hook(hook, prepend=True)  # before a norm of the output (`own_modules.OutputLinear`)
    return adapter


def _input_of(layer: nn.Module, config: Any, name: str) -> Callable[[Tensor], Tensor]:
    """What the layer multiplies with its weight: its input, unless TransformerEngine has fused a norm into it."""
    weight = getattr(layer, "layer_norm_weight", None)
    if weight is None:
        return lambda x: x
    if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
        raise ConfigError(f"{name} contains a norm other than plain RMSNorm: LoRA cannot be applied to it")
    return lambda x: rms_norm(x, weight, config.layernorm_epsilon)
