"""Latent attention in Megatron-Core's `MLATransformerConfig`: its fields from an `Architecture`, and back."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import MLA, Architecture
from megatron_rl.models.components.position import Scaling
from megatron_rl.models.megatron_fields import Refusal

# Field of the configuration -> key of Hugging Face's rope_parameters.
YARN = {
    "rotary_scaling_factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


def latent_fields(architecture: Architecture, mla: MLA) -> dict[str, Any]:
    """Fields beside those of every model.

    Raises:
        ConfigError: positions are scaled in a way that Megatron-Core's latent attention does not know.
    """
    scaling = dict(architecture.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ConfigError(f"rope_type {kind!r} with latent attention: Megatron-Core has default and yarn")
    return {
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.nope_dim,
        "qk_pos_emb_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "kv_channels": mla.value_dim,
        "qk_layernorm": True,
        "softmax_scale": None,  # from YaRN's fields
        "apply_rope_fusion": False,
        "rope_type": "yarn" if kind == "yarn" else "rope",
        "rotary_base": architecture.rope_theta,
    } | {field: scaling[key] for field, key in YARN.items() if scaling.get(key) is not None}


def latent_of(config: MLATransformerConfig) -> MLA:
    """Its sizes."""
    return MLA(
        config.q_lora_rank, config.kv_lora_rank, config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
    )


def scaling_of_latent(config: MLATransformerConfig) -> Scaling:
    """How it stretches positions, as Hugging Face spells it."""
    if config.rope_type != "yarn":
        return ()
    items = {key: getattr(config, field) for field, key in YARN.items()} | {"rope_type": "yarn"}
    return tuple(sorted(items.items()))


def refused_latent_fields(config: MLATransformerConfig) -> list[Refusal]:
    """What its `MLASelfAttention` would compute otherwise than `transformers`."""
    found = []
    if not config.qk_layernorm:
        found.append(Refusal("qk_layernorm", "False", "True with multi_latent_attention"))
    if config.rope_type == "yarn" and config.mscale != 1.0 and not config.mscale_all_dim:
        found.append(Refusal("mscale", str(config.mscale), "1.0 where mscale_all_dim is 0"))
    if config.rope_type != "yarn" and config.mscale_all_dim and config.rotary_scaling_factor > 1:
        # MultiLatentAttention scales the scores by them whatever the rope_type
        found.append(Refusal("mscale_all_dim", str(config.mscale_all_dim), "0 with rope_type=rope"))
    if config.rope_type != "yarn" and config.rotary_percent != 1.0:
        found.append(Refusal("rotary_percent", str(config.rotary_percent), "1.0 with multi_latent_attention"))
    return found
