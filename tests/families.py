"""One list of tiny Hugging Face configs, one or more for each registered family, with all that the family can have.

What is proved of a family is proved of every entry (`tests/matrix`). A new family adds its configs here.
Sizes divide over 2 and 4 ranks; of the key and value heads some are fewer than 4, and the vocabulary needs padding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SMALL = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
    "attn_implementation": "eager",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PARTS = {"short_factor": [1.0, 1.2, 1.5], "long_factor": [1.0, 2.0, 4.0], "partial_rotary_factor": 0.75}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}


def theta(base: float, scaling: dict | None = None) -> dict:
    return {"rope_parameters": {"rope_theta": base, **(scaling or {"rope_type": "default"})}}


def dense() -> dict[str, PretrainedConfig]:
    wide = SMALL | {"head_dim": 16}
    gemma = wide | {"num_key_value_heads": 2}
    bent = {"query_pre_attn_scalar": 24, "sliding_window": 9, "layer_types": ALTERNATING}
    return {
        "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
        "llama, tied, llama3 positions": LlamaConfig(**SMALL, tie_word_embeddings=True, **theta(5e5, LLAMA3)),
        "llama, all biases, wide heads, yarn": LlamaConfig(
            **wide, attention_bias=True, mlp_bias=True, **theta(1e4, YARN)
        ),
        "llama, biases of attention, linear positions": LlamaConfig(
            **SMALL, attention_bias=True, **theta(1e5, {"rope_type": "linear", "factor": 4.0})
        ),
        "llama, biases of the feed-forward layer": LlamaConfig(**SMALL, mlp_bias=True),
        "mistral": MistralConfig(**SMALL, sliding_window=9),
        "phi3": Phi3Config(**SMALL, sliding_window=9),
        "phi3, phi-4-mini": Phi3Config(
            **SMALL, tie_word_embeddings=True, original_max_position_embeddings=64, **theta(1e4, LONGROPE | PARTS)
        ),
        "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
        "qwen2, windows from layer 1 on": Qwen2Config(
            **SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1
        ),
        "qwen3": Qwen3Config(**gemma, tie_word_embeddings=False),
        "gemma": GemmaConfig(**wide | {"num_key_value_heads": 1}),
        "gemma2": Gemma2Config(**gemma, **bent, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
        "gemma3_text": Gemma3TextConfig(
            **gemma,
            **bent,
            rope_parameters={
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        ),
    }


def mixtures() -> dict[str, PretrainedConfig]:
    return {
        "mixtral": MixtralConfig(**SMALL, **EXPERTS, num_local_experts=4, sliding_window=9),
        "qwen3_moe": Qwen3MoeConfig(
            **SMALL | {"head_dim": 16}, **EXPERTS, num_experts=4, moe_intermediate_size=48, mlp_only_layers=[1]
        ),
        "qwen2_moe": Qwen2MoeConfig(
            **SMALL, **EXPERTS, num_experts=4, moe_intermediate_size=48, shared_expert_intermediate_size=40
        ),
        "glm4_moe": Glm4MoeConfig(
            **SMALL | {"head_dim": 16},
            **EXPERTS,
            attention_bias=True,
            use_qk_norm=True,
            n_routed_experts=8,
            moe_intermediate_size=24,
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
        ),
        "gpt_oss": GptOssConfig(
            **SMALL | {"head_dim": 16, "num_key_value_heads": 2},
            **EXPERTS,
            num_local_experts=4,
            sliding_window=9,
            swiglu_limit=1.0,
            **theta(1.5e5, {k: v for k, v in YARN.items() if k != "mscale"} | {"truncate": False}),
        ),
    }


def latent() -> dict[str, PretrainedConfig]:
    sizes = {
        "kv_lora_rank": 24,
        "q_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
    }
    sizes = SMALL | EXPERTS | sizes | {"num_key_value_heads": 8}
    yarn = theta(1e4, YARN | {"mscale": 0.8, "mscale_all_dim": 1.1, "beta_fast": 32.0, "beta_slow": 1.0})
    moonlight = {"q_lora_rank": None, "v_head_dim": 24, "n_group": 1, "topk_group": 1}
    other = {"rope_interleave": False, "norm_topk_prob": False, "rms_norm_eps": 1e-5}
    return {
        "deepseek_v2": DeepseekV2Config(**sizes, **yarn, topk_method="group_limited_greedy"),
        "deepseek_v3": DeepseekV3Config(**sizes, **yarn),
        "deepseek_v3, moonlight": DeepseekV3Config(**sizes | moonlight),
        "deepseek_v3, halves turn, weights not rescaled": DeepseekV3Config(**sizes | other, **yarn),
    }


FAMILIES: dict[str, PretrainedConfig] = dense() | mixtures() | latent()


def seeded_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """fp32, with weights large enough that every part matters; norms are near what they are at the start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                unscaled = "embed_tokens" in name and not config.model_type.startswith("gemma")
                parameter.copy_(torch.randn_like(parameter) * (0.5 if unscaled else 1.2 / parameter.shape[-1] ** 0.5))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    return model


def two_layers(name: str, vocab: int) -> PreTrainedModel:
    """The same of the first two layers of one of `FAMILIES`, with as many tokens as a tokenizer has."""
    config: Any = copy.deepcopy(FAMILIES[name])
    config.vocab_size, config.num_hidden_layers = vocab, 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return seeded_model(config)
