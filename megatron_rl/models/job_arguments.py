"""Megatron-LM's arguments, the ``argparse.Namespace`` in its checkpoints, as an `Architecture`, and back.

Its ``gpt_builder`` makes a model from them in two ways: fields of `TransformerConfig` of the same name
(``core_transformer_config_from_args``), and arguments of `GPTModel` and of the layer spec. The first are judged by
`architecture_from_megatron`, the second here: what no supported decoder computes is refused by its argument's name.
"""

from __future__ import annotations

import dataclasses
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.components.mla import LATENT_EPS
from megatron_rl.models.latent_fields import latent_fields
from megatron_rl.models.megatron_architecture import architecture_from_megatron
from megatron_rl.parallel import ParallelSizes

# Without these the model is not determined.
REQUIRED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "layernorm_epsilon",
    "normalization",
    "position_embedding_type",
    "rotary_base",
    "max_position_embeddings",
    "swiglu",
    "untie_embeddings_and_output_weights",
)

# Arguments beside TransformerConfig's fields that change what is computed, with the values that change nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "position_embedding_type": ("rope",),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "rope_scaling_factor": (8.0,),  # gpt_builder does not hand it on, so the model has GPTModel's default, 8
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "openai_gelu": (False,),
    "swiglu": (True,),
    "mtp_num_layers": (None, 0),
    "experimental_attention_variant": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "is_hybrid_model": (False,),
    "hybrid_override_pattern": (None,),
    "hybrid_attention_ratio": (0.0,),
    "hybrid_mlp_ratio": (0.0,),
    "spec": (None,),
    "use_legacy_models": (False,),
    "te_precision_config_file": (None,),
    "yaml_cfg": (None,),
}
# Arguments with such names that only say how a model is made or run.
HARMLESS = frozenset(
    {
        "embedding_path",
        "moe_pad_experts_for_cuda_graph_inference",
        "moe_upcycling_granularity",
        "moe_use_upcycling",
        "norm_epsilon",
    }
)
# A newer Megatron-LM may have an argument that this version knows nothing of: where its name says that it shapes the
# model, anything but "off" is refused.
SHAPES_THE_MODEL = re.compile(
    "(moe|rotary|rope|mla|attention|attn|qk|kv|softmax|window|sliding|glu|mtp|linear|dsa|norm|layernorm|position|hybrid"
    "|mamba|activation|residual|logit|logits|embedding|heterogeneous|experimental)_"
)
OFF: tuple[object, ...] = (None, False, 0, "", [], ())
# megatron.core RotaryEmbedding.apply_rope_scaling, whose other numbers are fixed
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FIELDS = {field.name for field in dataclasses.fields(MLATransformerConfig)}


def architecture_from_arguments(arguments: Namespace, vocab: int, in_family: bool = True) -> Architecture:
    """The decoder that Megatron-LM's ``gpt_builder`` makes from these arguments.

    Args:
        arguments: as a checkpoint holds them, after Megatron-LM's ``validate_args``.
        vocab: rows of the embedding that count.
        in_family: as of `architecture_from_megatron`.

    Raises:
        ConfigError: an argument is missing, or asks for what no supported decoder computes; the message names it.
    """
    values = _current_names(vars(arguments))
    missing = [name for name in REQUIRED if values.get(name) is None]
    if missing:
        raise ConfigError(
            f"the checkpoint's arguments lack {', '.join(missing)}: describe its model with a config.json"
        )
    _refuse(values)
    if values.get("multi_latent_attention") and values["layernorm_epsilon"] != LATENT_EPS:
        raise ConfigError(
            f"--norm-epsilon {values['layernorm_epsilon']} with --multi-latent-attention: norms over latents have "
            f"{LATENT_EPS} in `transformers`, whatever the others have; describe the model with a config.json"
        )
    return architecture_from_megatron(
        _transformer_config(values),
        vocab=vocab,
        tied=not values["untie_embeddings_and_output_weights"],
        rotary_fraction=float(values.get("rotary_percent", 1.0)),
        rope_theta=float(values["rotary_base"]),
        rope_scaling=tuple(sorted(LLAMA3_SCALING.items())) if values.get("use_rope_scaling") else (),
        max_positions=int(values["max_position_embeddings"]),
        in_family=in_family,
    )


def _current_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same under current names; older versions of Megatron-LM used others."""
    values = dict(given)
    for old, new in (("norm_epsilon", "layernorm_epsilon"), ("apply_layernorm_1p", "layernorm_zero_centered_gamma")):
        if old in values:
            values.setdefault(new, values[old])
    if values.get("use_rotary_position_embeddings"):
        values["position_embedding_type"] = "rope"
    return values


def _refuse(values: Mapping[str, Any]) -> None:
    wrong = [name for name, neutral in NEUTRAL.items() if name in values and values[name] not in neutral]
    if not values.get("use_rope_scaling") and "rope_scaling_factor" in wrong:
        wrong.remove("rope_scaling_factor")
    known = FIELDS | NEUTRAL.keys() | HARMLESS | {"rotary_percent"}
    wrong += [n for n in sorted(values) if n not in known and SHAPES_THE_MODEL.match(n) and values[n] not in OFF]
    if wrong:
        given = ", ".join(f"--{name.replace('_', '-')} {values[name]}" for name in wrong)
        raise ConfigError(
            f"the checkpoint's model was made with {given}, which no decoder here computes: it cannot be taken over"
        )


def _transformer_config(values: Mapping[str, Any]) -> TransformerConfig:
    """The fields as ``core_transformer_config_from_args`` gives them, without the checks of what this machine can run
    (``__post_init__``): the model is described here, not built."""
    kind = MLATransformerConfig if values.get("multi_latent_attention") else TransformerConfig
    config: TransformerConfig = object.__new__(kind)
    for field in dataclasses.fields(kind):
        if field.name in values:
            setattr(config, field.name, values[field.name])
        elif field.default_factory is not dataclasses.MISSING:
            setattr(config, field.name, field.default_factory())
        else:
            setattr(config, field.name, field.default)
    heads = config.num_attention_heads
    config.num_moe_experts = values.get("num_experts")
    config.activation_func, config.gated_linear_unit = F.silu, True
    config.num_query_groups = (values.get("group_query_attention") and values.get("num_query_groups")) or heads
    config.kv_channels = config.kv_channels or config.hidden_size // heads
    return config


# What every decoder here has in common, and what a checkpoint of nothing but weights says of its run.
COMMON: dict[str, object] = {
    "position_embedding_type": "rope",
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "rotary_interleaved": False,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "swiglu": True,
    "squared_relu": False,
    "apply_query_key_layer_scaling": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "moe_router_load_balancing_type": "none",
    "moe_grouped_gemm": False,
    "moe_token_dispatcher_type": "alltoall",
    "make_vocab_size_divisible_by": 128,
    # A tokenizer named here would take precedence over the command line's.
    "vocab_size": None,
    "tokenizer_type": None,
    "tokenizer_model": None,
    "virtual_pipeline_model_parallel_size": None,
    "ckpt_format": "torch_dist",
    "use_legacy_models": False,
    "data_parallel_random_init": False,
    "no_save_optim": True,
    "no_save_rng": True,
    "consumed_train_samples": 0,
    "skipped_train_samples": 0,
    "consumed_valid_samples": 0,
}


def arguments_from_architecture(
    a: Architecture, sizes: ParallelSizes, padded_vocab: int, dtype: torch.dtype
) -> Namespace:
    """What Megatron-LM reads of a checkpoint's arguments (``load_args_from_checkpoint``, ``check_checkpoint_args``),
    and what `architecture_from_arguments` needs."""
    grouped = a.num_kv_heads != a.num_heads
    return Namespace(
        **COMMON,
        **_expert_arguments(a),
        **_attention_arguments(a),
        num_layers=a.num_layers,
        encoder_num_layers=a.num_layers,
        hidden_size=a.hidden,
        ffn_hidden_size=a.ffn,
        num_attention_heads=a.num_heads,
        group_query_attention=grouped,
        num_query_groups=a.num_kv_heads if grouped else 1,
        seq_length=a.max_positions,
        max_position_embeddings=a.max_positions,
        rotary_percent=a.rotary_fraction,
        use_rope_scaling=dict(a.rope_scaling) == LLAMA3_SCALING,
        layernorm_epsilon=a.norm_eps,
        window_size=None if a.window is None else (a.window - 1, 0),
        window_attn_skip_freq=[int(i not in a.full_layers) for i in range(a.num_layers)] if a.full_layers else None,
        add_qkv_bias=a.qkv_bias,
        add_bias_linear=a.qkv_bias and a.o_bias and a.mlp_bias,
        untie_embeddings_and_output_weights=not a.tied,
        padded_vocab_size=padded_vocab,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )


def _attention_arguments(a: Architecture) -> dict[str, object]:
    base = int(a.rope_theta) if float(a.rope_theta).is_integer() else a.rope_theta
    if a.mla is None:
        plain: dict[str, object] = {"kv_channels": a.head_dim, "qk_layernorm": a.qk_norm, "rotary_base": base}
        return plain | {"multi_latent_attention": False}
    return latent_fields(a, a.mla) | {"multi_latent_attention": True, "rotary_base": base}


def _expert_arguments(a: Architecture) -> dict[str, object]:
    if a.experts is None:
        return {"num_experts": None, "moe_layer_freq": 1, "moe_ffn_hidden_size": None, "moe_router_topk": 2}
    grouped = a.experts.num_groups > 1
    return {
        "num_experts": a.experts.num_experts,
        "moe_layer_freq": [int(layer not in a.experts.dense_layers) for layer in range(a.num_layers)]
        if a.experts.dense_layers
        else 1,
        "moe_ffn_hidden_size": a.experts.ffn,
        "moe_router_topk": a.experts.experts_per_token,
        "moe_router_pre_softmax": a.experts.scoring == "softmax" and not a.experts.normalize_weights,
        "moe_router_score_function": a.experts.scoring,
        "moe_router_enable_expert_bias": a.experts.correction_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": a.experts.num_groups if grouped else None,
        "moe_router_group_topk": a.experts.chosen_groups if grouped else None,
        "moe_router_topk_scaling_factor": a.experts.scaling if a.experts.scaling != 1.0 else None,
        "moe_shared_expert_intermediate_size": a.experts.shared_ffn or None,
        "moe_shared_expert_gate": a.experts.shared_gate,
    }


def arguments_to_add(arguments: Namespace) -> list[str]:
    """What a command with ``--load`` and ``--use-checkpoint-args`` must still say: Megatron-LM (core_v0.16.1,
    ``load_args_from_checkpoint``) does not take these from a checkpoint."""
    flags = [f"--norm-epsilon {arguments.layernorm_epsilon!r}"]
    flags += ["--qk-layernorm"] if arguments.qk_layernorm else []
    flags += ["--use-rope-scaling"] if arguments.use_rope_scaling else []
    flags += ["--bf16"] if arguments.bf16 else ["--fp16"] if arguments.fp16 else []
    return flags
