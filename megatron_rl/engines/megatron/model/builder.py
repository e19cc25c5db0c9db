"""Megatron-Core models from an `Architecture`: the one place where `TransformerConfig` and `GPTModel` are made.

config = transformer_config(architecture, sizes, dtype=torch.bfloat16)
chunks = build_model(architecture, config, pg_collection=groups)   # one GPTModel per virtual pipeline stage
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform, use_transformer_engine
from megatron_rl.engines.megatron.model.kept_routes import keep_no_routes
from megatron_rl.engines.megatron.model.layer_spec import fits_transformer_engine, layer_spec
from megatron_rl.engines.megatron.model.own_modules import CappedOutput, ScaledEmbedding, become
from megatron_rl.engines.megatron.model.rope import inverse_frequencies, rotate_in_attention
from megatron_rl.engines.megatron.model.value_head import ValueHead
from megatron_rl.log import leave_out
from megatron_rl.models.activations import ACTIVATIONS
from megatron_rl.models.architecture import Architecture, Experts
from megatron_rl.models.components.mla import LATENT_EPS
from megatron_rl.models.components.mlp import DenseMLP
from megatron_rl.models.description import ModelDescription
from megatron_rl.models.family import describe
from megatron_rl.models.latent_fields import latent_fields
from megatron_rl.models.pipeline import chunk_layout, is_uneven, padded_vocab, stage_layers
from megatron_rl.parallel import ParallelSizes

VOCAB_MULTIPLE = 128  # Megatron-LM's default of make_vocab_size_divisible_by

# Megatron-Core warns about MLP classes other than its own; ours take the arguments that it passes by default.
leave_out("megatron.core.transformer.transformer_layer", "Unknown MLP type")


def transformer_config(
    architecture: Architecture,
    sizes: ParallelSizes,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    **overrides: Any,
) -> TransformerConfig:
    """Megatron's configuration of this architecture on this layout.

    Args:
        architecture: the decoder.
        sizes: parallel sizes; uneven pipelines follow `stage_layers`.
        dtype: of parameters and activations: float32, bfloat16 or float16.
        recompute: recompute each layer's activations in the backward pass.
        overrides: any other field of `TransformerConfig`, taken as it is.

    Raises:
        ConfigError: sizes that this architecture cannot be split into.
    """
    _check_sizes(architecture, sizes)
    fields = _decoder_fields(architecture) | _parallel_fields(architecture, sizes)
    fields |= _fusion_fields(describe(architecture))
    fields |= {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Losses are sums over tokens divided by global totals, so gradients are summed, never averaged.
        "calculate_per_token_loss": True,
    }
    if recompute:
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if architecture.experts is not None:
        fields |= _expert_fields(architecture.experts, architecture.num_layers)
    if architecture.mla is not None:
        return MLATransformerConfig(**fields | latent_fields(architecture, architecture.mla) | overrides)
    return TransformerConfig(**fields | overrides)


def build_model(
    architecture: Architecture,
    config: TransformerConfig,
    *,
    pg_collection: ProcessGroupCollection | None = None,
    device: torch.device | None = None,
    value_head: bool = False,
    shared_value_head: bool = False,
    vocab_multiple: int = VOCAB_MULTIPLE,
) -> list[GPTModel]:
    """This rank's model chunks, one per virtual pipeline stage, with Megatron's random initial weights.

    Args:
        architecture: the decoder; must be the one ``config`` was made from.
        config: from `transformer_config`.
        pg_collection: process groups; None takes those of Megatron's `parallel_state`.
        device: where the parameters go; None leaves them where Megatron put them.
        value_head: the last chunk gets a `ValueHead` in place of the output layer.
        shared_value_head: the last chunk gets a `ValueHead` beside its output layer, as ``chunk.value_head``.
        vocab_multiple: the vocabulary is padded to a multiple of this times tp.
    """
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    virtual_stages = config.virtual_pipeline_model_parallel_size
    vocab = padded_vocab(architecture.vocab, groups.tp.size(), vocab_multiple)
    tied = architecture.tied and not value_head
    chunks = []
    for vp_stage in range(virtual_stages) if virtual_stages else (None,):
        chunk = _build_chunk(architecture, config, groups, vp_stage, vocab, tied)
        if value_head and chunk.post_process:
            chunk.output_layer = ValueHead(config, groups.tp)
        if shared_value_head and chunk.post_process:
            chunk.value_head = ValueHead(config, groups.tp, beside_logits=True)
        chunks.append(chunk if device is None else chunk.to(device))
    return chunks


def _build_chunk(
    architecture: Architecture,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    vp_stage: int | None,
    vocab: int,
    tied: bool,
) -> GPTModel:
    """One chunk; ``vp_stage`` is None without interleaving, ``vocab`` counts padding rows too."""
    model = describe(architecture)
    pp_rank, last_stage = groups.pp.rank(), (config.virtual_pipeline_model_parallel_size or 1) - 1
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, vp_stage, pp_rank, architecture.experts, model),
        vocab_size=vocab,
        max_sequence_length=architecture.max_positions,
        pre_process=pp_rank == 0 and not vp_stage,
        post_process=pp_rank == groups.pp.size() - 1 and (vp_stage or 0) == last_stage,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        rotary_percent=architecture.rotary_fraction,
        parallel_output=True,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if not (use_transformer_engine() and fits_transformer_engine(model)):
        rotate_in_attention(chunk, model)
    elif architecture.mla is not None:
        for layer in chunk.decoder.layers:
            _set_latent_eps(layer.self_attention)
    else:
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies(architecture)
    if chunk.pre_process and model.embedding.scale != 1.0:
        become(chunk.embedding, ScaledEmbedding, scale=model.embedding.scale)
    if chunk.post_process and architecture.logit_softcap is not None:
        become(chunk.output_layer, CappedOutput, softcap=architecture.logit_softcap)
    keep_no_routes(chunk)
    return chunk


def _set_latent_eps(attention: Any) -> None:
    """Of the norms that TransformerEngine fuses into the projections from latents; Megatron-Core gives them that of
    other norms."""
    attention.linear_kv_up_proj.eps = LATENT_EPS
    if attention.config.q_lora_rank is not None:
        attention.linear_q_up_proj.eps = LATENT_EPS


def _decoder_fields(architecture: Architecture) -> dict[str, Any]:
    """Fields from the model description; most must have one value for all layers.

    Raises:
        ConfigError: layers differ where Megatron-Core wants one value.
    """
    model = describe(architecture)
    heads = model.shared(lambda layer: (layer.attention.num_heads, layer.attention.num_kv_heads), "attention heads")
    dense = [layer.mlp.ffn for layer in model.layers if isinstance(layer.mlp, DenseMLP)]
    return {
        "num_layers": len(model.layers),
        "hidden_size": model.embedding.hidden,
        "ffn_hidden_size": dense[0] if dense else architecture.ffn,
        "num_attention_heads": heads[0],
        "num_query_groups": heads[1],
        "kv_channels": model.shared(lambda layer: layer.attention.head_dim, "head sizes"),
        "layernorm_epsilon": model.shared(lambda layer: layer.attention_norm.eps, "the epsilon of norms"),
        "add_qkv_bias": model.shared(lambda layer: layer.attention.qkv_bias, "biases"),
        "qk_layernorm": model.shared(lambda layer: layer.attention.q_norm is not None, "query and key norms"),
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": _zero_centered(model),
        "activation_func": _activation(model),
        "gated_linear_unit": True,
        "add_bias_linear": architecture.qkv_bias and architecture.o_bias and architecture.mlp_bias,
        "softmax_type": "learnable" if architecture.sinks else "vanilla",
        "softmax_scale": model.shared(lambda layer: layer.attention.scale, "scales of attention scores"),
    } | _windows(model)


def _activation(model: ModelDescription) -> Callable[[Tensor], Tensor]:
    names = {layer.mlp.activation for layer in model.layers if isinstance(layer.mlp, DenseMLP)} or {"silu"}
    if len(names) > 1:
        raise ConfigError(f"the layers of this {model.family} model have activations {sorted(names)}; expected one")
    return ACTIVATIONS[names.pop()]


def _windows(model: ModelDescription) -> dict[str, Any]:
    """Megatron-Core has one window size, used by all layers or by some."""
    windows = [layer.attention.window for layer in model.layers]
    sizes = sorted({window for window in windows if window is not None})
    if len(sizes) > 1:
        raise ConfigError(
            f"the layers of this {model.family} model have sliding windows of {', '.join(map(str, sizes))} tokens; "
            "Megatron-Core has one size (window_size), which a layer has or has not"
        )
    if not sizes:
        return {"window_size": None}
    some = [int(window is not None) for window in windows] if None in windows else None
    # Keys to the left of a query, and to its right; 1 in the list, despite its name, for the layers that have it.
    return {"window_size": (sizes[0] - 1, 0), "window_attn_skip_freq": some}


def _zero_centered(model: ModelDescription) -> bool:
    """Whether norms multiply with ``1 + weight``; Megatron-Core has one setting for all norms of a model."""
    layers = model.shared(lambda layer: (layer.attention_norm.offset, layer.mlp_norm.offset), "offsets of norms")
    others = [(each.attention.q_norm, each.attention.k_norm, each.attention_post_norm) for each in model.layers]
    heads = [norm.offset for norms in others for norm in norms if norm]
    offsets = {model.final_norm.offset, *layers, *heads}
    if len(offsets) > 1 or not offsets <= {0.0, 1.0}:
        raise ConfigError(f"norms of this {model.family} model have offsets {sorted(offsets)}; expected all 0 or all 1")
    return offsets == {1.0}


def _parallel_fields(architecture: Architecture, sizes: ParallelSizes) -> dict[str, Any]:
    interleaved = sizes.vpp > 1
    uneven = is_uneven(architecture.num_layers, sizes.pp, sizes.vpp)
    layout = chunk_layout(architecture.num_layers, sizes.pp, sizes.vpp) if uneven else None
    return {
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "virtual_pipeline_model_parallel_size": sizes.vpp if interleaved else None,
        "pipeline_model_parallel_layout": layout,
        "context_parallel_size": sizes.cp,
        "expert_model_parallel_size": sizes.ep,
        "expert_tensor_parallel_size": sizes.etp,
        "sequence_parallel": sizes.sequence_parallel and sizes.tp > 1,
        # Blocking exchange between interleaved chunks gives a wrong loss on gloo; the overlapped one is right.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Also of dense models: Megatron refuses variable sequence lengths with the default dispatcher.
        "moe_token_dispatcher_type": "alltoall",
    }


def _fusion_fields(model: ModelDescription) -> dict[str, Any]:
    fused = use_transformer_engine() and fits_transformer_engine(model)
    return {
        "use_cpu_initialization": current_platform().name == "cpu",
        "bias_activation_fusion": fused
        and _activation(model) is ACTIVATIONS["silu"],  # Megatron-Core fuses no tanh GELU
        "bias_dropout_fusion": fused,
        "apply_rope_fusion": fused,
        "moe_grouped_gemm": fused,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
    }


def _expert_fields(experts: Experts, num_layers: int) -> dict[str, Any]:
    if experts.experts_per_token == 1 and experts.normalize_weights:
        raise ConfigError("experts_per_token=1 with normalised router weights: the router would have no gradient")
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.experts_per_token,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_shared_expert_intermediate_size": experts.shared_ffn or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_layer_freq": [int(layer not in experts.dense_layers) for layer in range(num_layers)],
        # A softmax over the chosen experts' logits is the softmax over all, rescaled to sum to 1.
        "moe_router_pre_softmax": experts.scoring == "softmax" and not experts.normalize_weights,
        "moe_router_score_function": experts.scoring,
        "moe_router_enable_expert_bias": experts.correction_bias,
        "moe_router_bias_update_rate": 0.0,  # the bias stays as it was loaded
        "moe_router_num_groups": experts.num_groups if experts.num_groups > 1 else None,
        "moe_router_group_topk": experts.chosen_groups if experts.num_groups > 1 else None,
        "moe_router_topk_scaling_factor": experts.scaling if experts.scaling != 1.0 else None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _check_sizes(architecture: Architecture, sizes: ParallelSizes) -> None:
    stage_layers(architecture.num_layers, sizes.pp, sizes.vpp)
    for name, count in (("num_heads", architecture.num_heads), ("ffn", architecture.ffn)):
        if count % sizes.tp:
            raise ConfigError(f"tp={sizes.tp} does not divide {name}={count}: choose a divisor")
    kv_heads = architecture.num_kv_heads
    if max(kv_heads, sizes.tp) % min(kv_heads, sizes.tp):
        raise ConfigError(f"tp={sizes.tp} and num_kv_heads={kv_heads}: one must divide the other")
    if sizes.vpp > 1 and sizes.pp == 1:
        raise ConfigError(f"vpp={sizes.vpp} needs pp of at least 2, got pp=1: set vpp=1")
    if architecture.experts is None:
        if sizes.ep > 1:
            raise ConfigError(f"ep={sizes.ep}, but {architecture.family} has no experts: set ep=1")
    elif architecture.experts.num_experts % sizes.ep:
        raise ConfigError(f"ep={sizes.ep} does not divide num_experts={architecture.experts.num_experts}")
    elif sizes.tp > 1 and not sizes.sequence_parallel:
        raise ConfigError(f"experts with tp={sizes.tp} need sequence_parallel=true")
