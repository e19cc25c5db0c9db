"""Hugging Face configs and Megatron configs to `Architecture` and back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from models.oracle import ALL, DEEPSEEK_V2, DEEPSEEK_V2_LITE, LLAMA, MISTRAL, MIXTRAL, QWEN2_WINDOWS, QWEN3_MOE
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_rl.config import ConfigError
from megatron_rl.engines.megatron.model.builder import transformer_config
from megatron_rl.models import Architecture, Experts
from megatron_rl.models.family import family_of, in_a_family
from megatron_rl.models.hf_config import architecture_from_hf, hf_config_from, read_hf_config
from megatron_rl.models.megatron_architecture import architecture_from_megatron
from megatron_rl.parallel import ParallelSizes


@pytest.mark.parametrize("architecture", [*ALL, QWEN2_WINDOWS], ids=lambda a: a.family)
def test_an_exported_config_reads_back_as_the_same_architecture(architecture: Architecture, tmp_path) -> None:
    config = hf_config_from(architecture, dtype="float32")
    config.save_pretrained(tmp_path)
    assert architecture_from_hf(read_hf_config(tmp_path)) == architecture
    assert config.architectures == [family_of(architecture.family).hf_class]


@pytest.mark.parametrize(
    "architecture", [*(a for a in ALL if a != DEEPSEEK_V2), DEEPSEEK_V2_LITE, QWEN2_WINDOWS], ids=lambda a: a.family
)
def test_a_megatron_config_reads_back_as_the_same_architecture(architecture: Architecture) -> None:
    config = transformer_config(architecture, ParallelSizes())
    found = architecture_from_megatron(
        config, architecture.vocab, architecture.tied, rotary_fraction=architecture.rotary_fraction
    )
    assert found == architecture


def test_llama3_rope_scaling_survives_both_ways() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(rope_parameters={"rope_theta": 5e5, **scaling}, max_position_embeddings=131072)
    architecture = architecture_from_hf(config)
    assert architecture.rope_theta == 5e5
    assert dict(architecture.rope_scaling) == scaling
    assert hf_config_from(architecture).rope_parameters == config.rope_parameters


def test_published_moe_config_is_read() -> None:
    config = Qwen3MoeConfig(num_experts=128, mlp_only_layers=[3], decoder_sparse_step=2, num_hidden_layers=6)
    expected = Experts(128, 8, 768, normalize_weights=False, dense_layers=(0, 2, 3, 4))
    assert architecture_from_hf(config).experts == expected


@pytest.mark.parametrize(
    ("code", "is_read"),
    [
        ("modeling_phi3.Phi3ForCausalLM", True),  # as published, from before transformers had the class
        ("microsoft/Phi-3.5-mini-instruct--modeling_phi3.Phi3ForCausalLM", True),  # saved again
        ("modeling_mine.Phi3ForCausalLM", False),
    ],
)
def test_a_folder_that_names_code_is_read_where_transformers_has_that_class(code: str, is_read: bool, tmp_path) -> None:
    Phi3Config(pad_token_id=0, auto_map={"AutoModelForCausalLM": code}).save_pretrained(tmp_path)
    if is_read:
        assert architecture_from_hf(read_hf_config(tmp_path)).family == "phi3"
    else:
        with pytest.raises(ConfigError, match="names code of its own"):
            read_hf_config(tmp_path)


def test_kimi_k2_is_read_as_the_family_that_it_is(tmp_path) -> None:
    """The published numbers, but for layers and the quantisation of its weights."""
    code = "DeepseekV3"
    kimi = {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_deepseek.{code}Config",
            "AutoModel": f"modeling_deepseek.{code}Model",
            "AutoModelForCausalLM": f"modeling_deepseek.{code}ForCausalLM",
        },
        "vocab_size": 163840,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(kimi))
    config = read_hf_config(tmp_path)
    found = architecture_from_hf(config)
    (tmp_path / "config.json").write_text(json.dumps(kimi | {"model_type": "deepseek_v3"}))
    assert found == architecture_from_hf(read_hf_config(tmp_path))
    assert (found.family, found.experts.num_experts, found.experts.scaling) == ("deepseek_v3", 384, 2.827)
    assert (dict(found.rope_scaling)["factor"], found.rope_theta, found.mla.q_rank) == (32.0, 5e4, 1536)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert "auto_map" not in config.to_dict()
    assert architecture_from_hf(AutoConfig.from_pretrained(tmp_path)) == found


def test_qwen2_keeps_a_head_size_of_its_own() -> None:
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=1)
    architecture = architecture_from_hf(config)
    assert architecture.head_dim == 32
    assert hf_config_from(architecture).head_dim == 32


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}}, "'dynamic' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_would_be_computed_differently_is_refused(fields: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        architecture_from_hf(LlamaConfig(**fields))


def test_biases_are_refused_of_families_that_have_none() -> None:
    with pytest.raises(ConfigError, match="attention_bias=True"):
        architecture_from_hf(MistralConfig(attention_bias=True))
    with pytest.raises(ConfigError, match="mlp_bias=True"):
        architecture_from_hf(Qwen3Config(mlp_bias=True))


def test_biases_of_llama_are_taken_one_by_one() -> None:
    found = [
        architecture_from_hf(LlamaConfig(attention_bias=attention, mlp_bias=mlp))
        for attention, mlp in ((True, False), (False, True))
    ]
    assert [(a.qkv_bias, a.o_bias, a.mlp_bias) for a in found] == [(True, True, False), (False, False, True)]


def test_sliding_windows_are_refused() -> None:
    with pytest.raises(ConfigError, match="sliding_window=8"):
        architecture_from_hf(Qwen3MoeConfig(use_sliding_window=True, sliding_window=8))


def test_a_window_is_taken_from_the_families_that_have_one() -> None:
    assert architecture_from_hf(MistralConfig()).window == 4096
    assert architecture_from_hf(MistralConfig(sliding_window=None)).window is None
    assert architecture_from_hf(MixtralConfig(sliding_window=64)).window == 64
    with pytest.raises(ConfigError, match="sliding_window=0"):
        architecture_from_hf(MistralConfig(sliding_window=0))


def test_layers_with_and_without_a_window_are_taken_from_layer_types() -> None:
    four = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8}
    found = architecture_from_hf(Qwen2Config(**four, max_window_layers=1))
    assert (found.window, found.full_layers) == (8, (0,))
    fields = family_of("qwen2").config_fields(found)
    assert (fields["max_window_layers"], fields["layer_types"]) == (1, ["full_attention"] + 3 * ["sliding_attention"])
    assert architecture_from_hf(Qwen2Config(**four, max_window_layers=4)).window is None
    with pytest.raises(ConfigError, match="layer_types"):
        architecture_from_hf(Qwen3Config(**four, layer_types=["chunked_attention"] * 4))


def test_a_window_of_0_beside_a_no_is_none(tmp_path) -> None:
    fields = Qwen2Config(num_hidden_layers=2).to_dict() | {"use_sliding_window": False, "sliding_window": 0}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"layer_types": None}))
    assert architecture_from_hf(read_hf_config(tmp_path)).window is None


def test_megatron_has_a_window_in_some_layers() -> None:
    config = transformer_config(QWEN2_WINDOWS, ParallelSizes())
    assert (config.window_size, config.window_attn_skip_freq) == ((6, 0), [1, 0, 1, 1])


def test_megatron_models_find_the_first_family_that_can_say_all_of_them() -> None:
    plain, windowed = replace(MISTRAL, window=None), replace(LLAMA, window=5)
    assert in_a_family(plain) == LLAMA
    assert in_a_family(windowed) == replace(MISTRAL, window=5)
    assert in_a_family(replace(MIXTRAL, ffn=99)) == MIXTRAL  # no layer reads 99
    with pytest.raises(ConfigError, match="window=5"):
        in_a_family(replace(QWEN3_MOE, window=5))
    with pytest.raises(ConfigError, match=r"window_size=\(4, 4\)"):
        architecture_from_megatron(transformer_config(LLAMA, ParallelSizes(), window_size=(4, 4)), 50, False)


def test_unknown_families_are_refused_with_the_list_and_the_place_to_add_one(tmp_path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"'gpt2' is not supported.*glm4_moe, .*llama, .*_rl/models",
    ):
        architecture_from_hf(AutoConfig.for_model("gpt2"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen_3"}))
    with pytest.raises(ConfigError, match="Did you mean 'qwen3'"):
        read_hf_config(tmp_path)


def test_missing_or_broken_config_files_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not a JSON object"):
        read_hf_config(tmp_path)


def test_megatron_models_that_no_family_computes_are_refused() -> None:
    config = transformer_config(LLAMA, ParallelSizes(), normalization="LayerNorm", glu_linear_offset=1.0)
    with pytest.raises(ConfigError, match=r"normalization='LayerNorm', glu_linear_offset=1.0"):
        architecture_from_megatron(config, 50, False)
    with pytest.raises(ConfigError, match="no Hugging Face family"):
        in_a_family(replace(LLAMA, qkv_bias=True, qk_norm=True))


def test_unnormalised_router_weights_are_megatrons_softmax_before_top_k() -> None:
    experts = QWEN3_MOE.experts
    assert experts is not None
    architecture = replace(QWEN3_MOE, experts=replace(experts, normalize_weights=False))
    config = transformer_config(architecture, ParallelSizes())
    assert config.moe_router_pre_softmax
    assert architecture_from_megatron(config, 50, False) == architecture
