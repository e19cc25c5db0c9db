"""LoRA: a model whose own weights are frozen, with a trained `LoraAdapter` on each of the chosen linear layers.

adapters = add_adapters(chunks, LoraConfig(rank=16, alpha=32), seed=0)      # before DDP and the optimizer are built

Frozen weights have no gradient buffers and no optimizer state; value heads are trained whole. Each layer keeps its
class, its parameters and their names: an adapter stands beside it and is added by a forward hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import LoraConfig
from megatron_rl.engines.megatron.model.lora_adapter import LoraAdapter
from megatron_rl.engines.megatron.model.lora_places import AdaptedLayer, adapted_layers, check_experts
from megatron_rl.engines.megatron.model.model_chunk import unwrap
from megatron_rl.engines.megatron.model.value_head import ValueHead
from megatron_rl.models.lora_update import SUFFIX, first_values
from megatron_rl.models.starting_adapters import Start, StartingAdapters
from megatron_rl.ops.rms_norm import rms_norm
from megatron_rl.reshard.layout import Shard


def add_adapters(
    chunks: Sequence[nn.Module],
    lora: LoraConfig,
    seed: int,
    starting: StartingAdapters | None = None,
    shards: Iterable[Shard] = (),
) -> dict[str, LoraAdapter]:
    """Freeze a rank's bare chunks and add adapters: name of the adapted weight (as layouts name it) -> its adapter.

    Args:
        seed: of the initial values, which depend on nothing else but the layer's name.
        starting: what adapters start from, and which layers have some; None = first values, where ``lora`` says.
        shards: of this rank; needed with ``starting``.

    Raises:
        ConfigError: the chunks are wrapped already, have no such layer, or it is one of grouped or cut experts.
    """
    if any(hasattr(chunk, "ddp_config") for chunk in chunks):
        raise ConfigError(
            "LoRA was asked for with model chunks that are wrapped in DistributedDataParallel: its gradient buffers "
            "hold the whole model's already. Give bare chunks without an optimizer, and both are made here"
        )
    targets = lora.target_modules if starting is None else starting.targets
    check_experts(unwrap(chunks[0]).config, targets)
    layers = [
        layer for index, chunk in enumerate(chunks) for layer in adapted_layers(chunk, index, len(chunks), targets)
    ]
    for chunk in chunks:
        _freeze(unwrap(chunk))
    if starting is None:
        return {layer.shard: _add(layer, _fresh(layer, lora, seed), lora.dropout_after()) for layer in layers}
    dropout = lora.dropout_after(starting.adapters.config.dropout)
    by_name = {shard.name: shard for shard in shards}
    return {
        layer.shard: _add(layer, starting.start(layer.name, by_name[layer.shard], layer.transposed), dropout)
        for layer in layers
        if starting.has(layer.name)
    }


def _fresh(layer: AdaptedLayer, lora: LoraConfig, seed: int) -> Start:
    """A is drawn (`first_values`), B is zero: at first the adapter adds 0. The draw is that of the whole A, so initial
    values do not depend on the layout."""
    weight = layer.weight
    outputs, inputs = weight.T.shape if layer.transposed else weight.shape
    is_cut = layer.row_parallel and not layer.replicated
    size, index = (layer.tp_group.size(), layer.tp_group.rank()) if is_cut else (1, 0)
    whole = first_values(layer.name, lora.rank, inputs * size, seed)
    own = whole[:, index * inputs : (index + 1) * inputs]
    return Start(own, torch.zeros(outputs, lora.rank), lora.alpha / lora.rank)


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


def _add(place: AdaptedLayer, start: Start, dropout: float) -> LoraAdapter:
    layer, config = place.module, place.parent.config
    adapter = LoraAdapter(config, place, start, dropout)
    place.parent.add_module(place.target + SUFFIX, adapter)
    seen = _input_of(layer, config, place.name)

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not adapter.enabled:
            return None
        if isinstance(output, Tensor):
            return output + adapter(seen(inputs[0]))
        value, *rest = output
        return (value + adapter(seen(inputs[0])), *rest)

    layer.register_forward_hook(hook, prepend=True)  # before a norm of the output (`own_modules.OutputLinear`)
    return adapter


def _input_of(layer: Any, config: Any, name: str) -> Callable[[Tensor], Tensor]:
    """What the layer multiplies with its weight: its input, unless TransformerEngine has fused a norm into it."""
    weight = getattr(layer, "layer_norm_weight", None)
    if weight is None:
        return lambda x: x
    if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
        raise ConfigError(f"{name} contains a norm other than plain RMSNorm: LoRA cannot be applied to it")
    return lambda x: rms_norm(x, weight, layer.eps)
