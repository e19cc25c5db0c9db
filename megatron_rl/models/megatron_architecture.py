"""The `Architecture` of a model that a Megatron job built itself, read from its `TransformerConfig`.

Everything the decoder of `models/family.py` does not compute is refused (`models/megatron_fields.py` says what), so
that an exported Hugging Face folder or a rollout engine never silently runs a different model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture, Experts
from megatron_rl.models.family import in_a_family
from megatron_rl.models.latent_fields import latent_of, refused_latent_fields, scaling_of_latent
from megatron_rl.models.megatron_fields import Refusal, refused_fields


def architecture_from_megatron(
    config: TransformerConfig,
    vocab: int,
    tied: bool,
    rope_theta: float = 10000.0,
    rope_scaling: tuple[tuple[str, object], ...] = (),
    rotary_fraction: float = 1.0,
    max_positions: int = 4096,
    in_family: bool = True,
) -> Architecture:
    """Translate a `TransformerConfig`; what it does not hold comes from the `GPTModel`'s arguments.

    Args:
        vocab: tokens of the tokenizer, without the rows that pad Megatron's embedding.
        tied: ``share_embeddings_and_output_weights``.
        rope_theta: ``rotary_base``.
        rope_scaling: as Hugging Face spells it, sorted items; () = none.
        rotary_fraction: ``rotary_percent``.
        max_positions: ``max_sequence_length``.
        in_family: find the Hugging Face family that it is exported as; False leaves ``family`` empty.

    Raises:
        ConfigError: the model is none that a supported Hugging Face family computes.
    """
    latent = isinstance(config, MLATransformerConfig) and config.multi_latent_attention
    refuse(refused_fields(config) + (refused_latent_fields(config) if latent else []))
    window, full_layers = _windows(config)
    architecture = Architecture(
        family="",
        num_layers=config.num_layers,
        hidden=config.hidden_size,
        ffn=config.ffn_hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab=vocab,
        tied=tied,
        qkv_bias=config.add_qkv_bias or config.add_bias_linear,
        o_bias=config.add_bias_linear,
        mlp_bias=config.add_bias_linear,
        qk_norm=config.qk_layernorm,
        norm_eps=config.layernorm_epsilon,
        rope_theta=float(rope_theta),
        rope_scaling=rope_scaling,
        rotary_fraction=rotary_fraction,
        max_positions=max_positions,
        experts=_experts(config),
        window=window,
        full_layers=full_layers,
        activation=_activation(config),
    )
    architecture = _with_latents(architecture, config) if latent else architecture
    return in_a_family(architecture) if in_family else architecture


def _with_latents(architecture: Architecture, config: MLATransformerConfig) -> Architecture:
    """The same with latent attention, which has positions of its own."""
    mla = latent_of(config)
    return replace(
        architecture,
        mla=mla,
        head_dim=mla.nope_dim + mla.rope_dim,
        num_kv_heads=architecture.num_heads,
        qk_norm=False,
        rope_theta=float(config.rotary_base),
        rope_scaling=scaling_of_latent(config),
    )


def _activation(config: TransformerConfig) -> str:
    """Hugging Face's name of it. Megatron-Core's fused GeGLU has the tanh approximation (fused_bias_geglu.py)."""
    if config.activation_func is not F.gelu:
        return "silu"
    if config.use_te_activation_func:
        refuse([Refusal("use_te_activation_func", "True with activation_func=gelu", "False")])
    return "gelu_pytorch_tanh" if config.bias_activation_fusion else "gelu"


def _windows(config: TransformerConfig) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers without it."""
    if config.window_size is None:
        return None, ()
    left, right = config.window_size
    if left < 0 or right != 0:
        refuse([Refusal("window_size", str(config.window_size), "None or (keys to the left, 0)")])
    size, frequency, layers = config.window_size, config.window_attn_skip_freq, range(config.num_layers)
    full = tuple(i for i in layers if not is_layer_window_attention(size, frequency, i + 1))
    return (left + 1, full) if len(full) < len(layers) else (None, ())


def _experts(config: TransformerConfig) -> Experts | None:
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
        shared_ffn=config.moe_shared_expert_intermediate_size or 0,
        shared_gate=bool(config.moe_shared_expert_intermediate_size and config.moe_shared_expert_gate),
        dense_layers=tuple(i for i, has_experts in enumerate(frequency) if not has_experts),
        **_routing(config),
    )


def _routing(config: TransformerConfig) -> dict[str, Any]:
    """Of `Experts`, as megatron.core ``topk_routing_with_score_function`` computes it."""
    softmax, chosen = config.moe_router_score_function == "softmax", config.moe_router_group_topk
    groups = {
        "num_groups": config.moe_router_num_groups,
        "chosen_groups": chosen,
        "group_scored_by": config.moe_router_topk // chosen if chosen else None,
    }
    return (groups if chosen else {}) | {
        "scoring": config.moe_router_score_function,
        # softmax over the chosen logits equals softmax over all, rescaled to sum to 1; sigmoids are always rescaled
        "normalize_weights": not config.moe_router_pre_softmax if softmax else config.moe_router_topk > 1,
        "correction_bias": config.moe_router_enable_expert_bias,
        "scaling": config.moe_router_topk_scaling_factor or 1.0,
    }


def refuse(refusals: Sequence[Refusal]) -> None:
    """Raise ConfigError that names all ``refusals``, if there are any."""
    if refusals:
        given = ", ".join(f"{refusal.name}={refusal.given}" for refusal in refusals)
        supported = "; ".join(f"{refusal.name}: {refusal.expected}" for refusal in refusals)
        raise ConfigError(
            f"the Megatron model has {given}; supported is {supported}. It would be sampled from and exported as "
            "another model: change it, or add its family in megatron_rl/models (see docs/megatron_arguments.md)"
        )
