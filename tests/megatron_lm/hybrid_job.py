"""A `HybridModel` as Megatron-LM's ``hybrid_builder`` makes it from a pattern, of the local layers of a `GPTModel`.

Megatron-Core's own hybrid layer specs are TransformerEngine's, and so is the final norm that its stack makes itself; on
a CPU these are the local layers, cut in two, and our norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from job import JobArguments
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_rl.devices import use_transformer_engine
from megatron_rl.engines.megatron.model.layer_spec import local_layer
from megatron_rl.engines.megatron.model.rms_norm import RMSNorm


def hybrid_provider(args: JobArguments, config: TransformerConfig) -> Callable[..., torch.nn.Module]:
    """A model provider for ``--hybrid-layer-pattern``; ``packed`` jobs get our norm and attention in the layers."""
    if not use_transformer_engine():
        hybrid_block.TENorm = RMSNorm

    def provide(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> torch.nn.Module:
        return HybridModel(
            config=config,
            hybrid_stack_spec=stack_spec(config, own_layers=args.sequence_parallel),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            hybrid_layer_pattern=args.hybrid_layer_pattern,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=args.rotary_base,
            vp_stage=vp_stage,
        )

    return provide


def stack_spec(config: TransformerConfig, own_layers: bool) -> ModuleSpec:
    """The modules for the letters ``*``, ``-`` and ``E``."""
    stage = 0 if config.virtual_pipeline_model_parallel_size else None
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage, pp_rank=0
    )
    layer: Any = local_layer(block.layer_specs[0], config) if own_layers else block.layer_specs[0]
    parts = layer.submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm,
        self_attention=parts.self_attention,
        self_attn_bda=parts.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda)
    modules = HybridStackSubmodules(
        attention_layer=ModuleSpec(TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(MLPLayer, submodules=mlp),
        moe_layer=ModuleSpec(MoETransformerLayer, submodules=mlp),
    )
    return ModuleSpec(HybridStack, submodules=modules)
