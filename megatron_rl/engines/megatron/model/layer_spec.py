"""Layer specs: TransformerEngine's modules where they can run, else Megatron-Core's local ones.

The local spec gets our RMSNorm and core attention in place of Megatron's, which refuse sequence parallelism, packing
and context parallelism, and our gated activation, which is faster. Both specs give the same checkpoint names.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.devices import use_transformer_engine
from megatron_rl.engines.megatron.model.core_attention import CoreAttention
from megatron_rl.engines.megatron.model.expert_router import ExpertRouter, is_megatrons
from megatron_rl.engines.megatron.model.gated_mlp import GatedMLP
from megatron_rl.engines.megatron.model.rms_norm import RMSNorm
from megatron_rl.models.architecture import Experts


def layer_spec(
    config: TransformerConfig,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    experts: Experts | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one model chunk, for `GPTModel(transformer_layer_spec=...)`.

    Args:
        config: sizes and pipeline split; dense or mixture of experts.
        vp_stage: the chunk, with interleaved pipelines; else None.
        pp_rank: the pipeline stage; None asks Megatron's `parallel_state`.
        experts: how they are chosen, where ``config`` cannot say it; None = as it says.

    Raises:
        ValueError: without TransformerEngine, for a norm other than RMSNorm.
    """
    if use_transformer_engine():
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage, pp_rank=pp_rank)
        return replace(block, layer_specs=[_routed(spec, experts) for spec in block.layer_specs or []])
    if config.normalization != "RMSNorm" or config.multi_latent_attention:
        raise ValueError(
            f"normalization={config.normalization}, multi_latent_attention={config.multi_latent_attention}: without "
            f"TransformerEngine and a GPU only RMSNorm and multi-head or grouped-query attention are supported"
        )
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage, pp_rank=pp_rank
    )
    return TransformerBlockSubmodules(
        layer_specs=[_routed(local_layer(spec, config.qk_layernorm), experts) for spec in block.layer_specs or []],
        layer_norm=RMSNorm,
    )


def _routed(spec: ModuleSpec, experts: Experts | None) -> ModuleSpec:
    """The layer with a router that chooses as ``experts`` says, where Megatron-Core's own cannot."""
    mlp = spec.submodules.mlp
    if experts is None or is_megatrons(experts) or getattr(mlp, "module", None) is not MoELayer:
        return spec
    router = functools.partial(ExpertRouter, experts=experts)
    mlp = replace(mlp, submodules=replace(mlp.submodules, router=router))
    return replace(spec, submodules=replace(spec.submodules, mlp=mlp))


def local_layer(spec: ModuleSpec, qk_norm: bool) -> ModuleSpec:
    """Megatron's local layer ``spec`` with our norm, core attention and dense feed-forward layer."""
    layer = spec.submodules
    attention = layer.self_attention
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if qk_norm else {}
    inner = replace(attention.submodules, core_attention=CoreAttention, **norms)
    dense = getattr(layer.mlp, "module", None) is MLP
    submodules = replace(
        layer,
        mlp=replace(layer.mlp, module=GatedMLP) if dense else layer.mlp,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=replace(attention, submodules=inner),
    )
    return replace(spec, submodules=submodules)
