"""The `Architecture` of a model that a Megatron job built itself, read from its `TransformerConfig`.

Everything the decoder of `models/family.py` does not compute is refused here, so that an exported Hugging Face
folder or a rollout engine never runs a different model in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture, Experts
from megatron_rl.models.family import matching_family


class MegatronConfig(Protocol):
    """What is read of megatron.core's `TransformerConfig`."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    normalization: str
    layernorm_epsilon: float
    layernorm_zero_centered_gamma: bool
    activation_func: Callable[..., Any]
    gated_linear_unit: bool
    add_bias_linear: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    num_moe_experts: int | None
    moe_router_topk: int
    moe_ffn_hidden_size: int | None
    moe_layer_freq: int | list[int]
    moe_router_pre_softmax: bool
    moe_router_score_function: str
    moe_router_enable_expert_bias: bool
    moe_shared_expert_intermediate_size: int | None


def architecture_from_megatron(
    config: MegatronConfig,
    vocab: int,
    tied: bool,
    rope_theta: float = 10000.0,
    rope_scaling: tuple[tuple[str, object], ...] = (),
    max_positions: int = 4096,
) -> Architecture:
    """Translate a `TransformerConfig`; what it does not hold comes from the `GPTModel`'s arguments.

    Args:
        vocab: tokens of the tokenizer, without the rows that pad Megatron's embedding.
        tied: ``share_embeddings_and_output_weights``.
        rope_theta: ``rotary_base``.
        rope_scaling: as Hugging Face spells it, sorted items; () = none.
        max_positions: ``max_sequence_length``.

    Raises:
        ConfigError: the model is none that a supported Hugging Face family computes.
    """
    _check(config)
    experts = _experts(config)
    return Architecture(
        family=matching_family(config.add_qkv_bias, config.qk_layernorm, experts is not None).model_type,
        num_layers=config.num_layers,
        hidden=config.hidden_size,
        ffn=config.ffn_hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab=vocab,
        tied=tied,
        qkv_bias=config.add_qkv_bias,
        qk_norm=config.qk_layernorm,
        norm_eps=config.layernorm_epsilon,
        rope_theta=float(rope_theta),
        rope_scaling=rope_scaling,
        max_positions=max_positions,
        experts=experts,
    )


def _experts(config: MegatronConfig) -> Experts | None:
    if config.num_moe_experts is None:
        return None
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        # megatron.core get_gpt_decoder_block_spec: layer i has experts where i % frequency == 0
        frequency = [int(i % frequency == 0) for i in range(config.num_layers)]
    return Experts(
        num_experts=config.num_moe_experts,
        experts_per_token=config.moe_router_topk,
        ffn=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        # softmax over the chosen logits equals softmax over all, rescaled to sum to 1
        normalize_weights=not config.moe_router_pre_softmax,
        dense_layers=tuple(i for i, has_experts in enumerate(frequency) if not has_experts),
    )


def _check(config: MegatronConfig) -> None:
    expected = {
        "normalization": config.normalization == "RMSNorm",
        "layernorm_zero_centered_gamma": not config.layernorm_zero_centered_gamma,
        "activation_func": config.activation_func is F.silu,
        "gated_linear_unit": config.gated_linear_unit,
        "add_bias_linear": not config.add_bias_linear,
        "moe_router_score_function": config.num_moe_experts is None or config.moe_router_score_function == "softmax",
        "moe_router_enable_expert_bias": not config.moe_router_enable_expert_bias,
        "moe_shared_expert_intermediate_size": not config.moe_shared_expert_intermediate_size,
    }
    wrong = [key for key, fits in expected.items() if not fits]
    if wrong:
        given = ", ".join(f"{key}={getattr(config, key)!r}" for key in wrong)
        raise ConfigError(
            f"the Megatron model has {given}; supported are decoders with RMSNorm, gated SiLU, no linear biases, and "
            "softmax routing without a shared expert: change the model, or add its family in megatron_rl/models"
        )
