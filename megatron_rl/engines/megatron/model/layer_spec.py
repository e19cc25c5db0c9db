"""Layer specs: TransformerEngine's modules where they can run, else Megatron-Core's local ones.

The local spec gets our RMSNorm and core attention in place of Megatron's, which refuse sequence parallelism, packing
and context parallelism, and our gated activation, which is faster. Both specs give the same checkpoint names. Models
with what TransformerEngine's modules have no place for get the local spec everywhere.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.devices import use_transformer_engine
from megatron_rl.engines.megatron.model.clamped_experts import ClampedExperts
from megatron_rl.engines.megatron.model.core_attention import CoreAttention
from megatron_rl.engines.megatron.model.expert_router import ExpertRouter, is_megatrons
from megatron_rl.engines.megatron.model.gated_mlp import GatedMLP
from megatron_rl.engines.megatron.model.latent_attention import LatentAttention
from megatron_rl.engines.megatron.model.own_modules import BiasedInputLinear, OutputLinear
from megatron_rl.engines.megatron.model.rms_norm import RMSNorm
from megatron_rl.models.architecture import Experts
from megatron_rl.models.components.mla import LatentAttention as LatentDescription
from megatron_rl.models.components.mlp import DenseMLP
from megatron_rl.models.description import LayerDescription, ModelDescription

logger = logging.getLogger(__name__)


def layer_spec(
    config: TransformerConfig,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    experts: Experts | None = None,
    model: ModelDescription | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one model chunk, for `GPTModel(transformer_layer_spec=...)`.

    Args:
        config: sizes and pipeline split; dense or mixture of experts.
        vp_stage: the chunk, with interleaved pipelines; else None.
        pp_rank: the pipeline stage; None asks Megatron's `parallel_state`.
        experts: how they are chosen, where ``config`` cannot say it; None = as it says.
        model: what else ``config`` cannot say; None = nothing.

    Raises:
        ValueError: without TransformerEngine, for a norm other than RMSNorm.
    """
    if use_transformer_engine() and (model is None or fits_transformer_engine(model)):
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage, pp_rank=pp_rank)
        return replace(block, layer_specs=[_routed(spec, experts) for spec in block.layer_specs or []])
    if config.normalization != "RMSNorm":
        raise ValueError(
            f"normalization={config.normalization}: without TransformerEngine and a GPU only RMSNorm is supported"
        )
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage, pp_rank=pp_rank
    )
    return TransformerBlockSubmodules(
        layer_specs=[_routed(local_layer(spec, config, model), experts) for spec in block.layer_specs or []],
        layer_norm=RMSNorm,
    )


def _routed(spec: ModuleSpec, experts: Experts | None) -> ModuleSpec:
    """The layer with router and experts that do as ``experts`` says, where Megatron-Core's own cannot."""
    mlp = spec.submodules.mlp
    if experts is None or getattr(mlp, "module", None) is not MoELayer:
        return spec
    parts = mlp.submodules
    if not is_megatrons(experts):
        parts = replace(parts, router=functools.partial(ExpertRouter, experts=experts))
    if experts.clamp is not None:
        parts = replace(parts, experts=replace(parts.experts, module=ClampedExperts, params={"limit": experts.clamp}))
    return replace(spec, submodules=replace(spec.submodules, mlp=replace(mlp, submodules=parts)))


def fits_transformer_engine(model: ModelDescription) -> bool:
    """Whether TransformerEngine's layers, as Megatron-Core makes them, compute ``model``."""
    reasons = {
        "biases of single layers": any(len(set(_biases(layer))) > 1 for layer in model.layers),
        "norms behind layers": any(layer.attention_post_norm or layer.mlp_post_norm for layer in model.layers),
        "attention sinks": any(layer.attention.sinks for layer in model.layers),
        "soft caps of scores": any(layer.attention.softcap is not None for layer in model.layers),
        "rotary positions that differ": len({layer.attention.rotary for layer in model.layers}) > 1,
        "rotary positions with an amplitude": any(
            layer.attention.rotary.amplitude != 1.0 and not isinstance(layer.attention, LatentDescription)
            for layer in model.layers
        ),
        "latent attention whose halves turn": not all(map(_is_interleaved, model.layers)),
        "rotary positions by length": any(layer.attention.rotary.switch is not None for layer in model.layers),
    }
    found = [reason for reason, is_so in reasons.items() if is_so]
    if found:
        logger.info("%s has %s: built without TransformerEngine", model.family, " and ".join(found))
    return not found


def _biases(layer: LayerDescription) -> tuple[bool, bool]:
    """Of both layers that Megatron-Core gives biases together, beside those of queries, keys and values."""
    return layer.attention.o_bias, isinstance(layer.mlp, DenseMLP) and layer.mlp.bias


def local_layer(spec: ModuleSpec, config: TransformerConfig, model: ModelDescription | None = None) -> ModuleSpec:
    """Megatron's local layer ``spec`` with our norm, core attention and dense feed-forward layer."""
    layer = spec.submodules
    attention, dense = layer.self_attention, getattr(layer.mlp, "module", None) is MLP
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if config.qk_layernorm else {}
    if attention.module is MLASelfAttention:
        norms = {"q_layernorm": RMSNorm, "kv_layernorm": RMSNorm}
        attention = replace(attention, module=LatentAttention, params=attention.params | _latent_options(model))
    inner = replace(attention.submodules, core_attention=CoreAttention, **norms)
    if model is not None:
        inner, layer = _own_linears(inner, layer, config, model, dense)
    submodules = replace(
        layer,
        mlp=replace(layer.mlp, module=GatedMLP) if dense else layer.mlp,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=replace(attention, submodules=inner),
    )
    return replace(spec, submodules=submodules)


def _latent_options(model: ModelDescription | None) -> dict[str, bool]:
    """What ``config`` does not say of latent attention: which channels turn together."""
    if model is None:
        return {}
    return {"interleaved": model.shared(_is_interleaved, "channels that turn together")}


def _is_interleaved(layer: LayerDescription) -> bool:
    return not isinstance(layer.attention, LatentDescription) or layer.attention.mla.interleaved


def _own_linears(
    inner: Any, layer: Any, config: TransformerConfig, model: ModelDescription, dense: bool
) -> tuple[Any, Any]:
    """Submodules of attention and of the layer with `own_modules` where ``config`` does not say what ``model`` has."""
    o_bias = model.shared(lambda described: described.attention.o_bias, "biases")
    normed = model.shared(lambda described: described.attention_post_norm is not None, "norms")
    biased = any(isinstance(described.mlp, DenseMLP) and described.mlp.bias for described in model.layers)
    if normed or o_bias != config.add_bias_linear:
        inner = replace(inner, linear_proj=ModuleSpec(OutputLinear, params={"biased": o_bias, "normed": normed}))
    if dense and (normed or biased != config.add_bias_linear):
        fc2 = ModuleSpec(OutputLinear, params={"biased": biased, "normed": normed})
        linears = replace(layer.mlp.submodules, linear_fc2=fc2)
        linears = replace(linears, linear_fc1=BiasedInputLinear) if biased else linears
        layer = replace(layer, mlp=replace(layer.mlp, submodules=linears))
    return inner, layer
