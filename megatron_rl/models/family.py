"""`ModelFamily`: the dense Llama decoder, and the places where a Hugging Face model type may differ from it.

A family translates a Hugging Face config to an `Architecture` and back, and lists the parameters of each layer as
data. All layouts follow from that list. A new family is a subclass in its own file that states its differences, with
one registry line, imported by `models/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture, Experts
from megatron_rl.models.parameters import FusedQKV, GateUp, InputColumns, Parameter, Replicated, VocabularyRows
from megatron_rl.models.routed_experts import RoutedExperts
from megatron_rl.registry import Registry, nearest

FAMILIES: Registry[type[ModelFamily]] = Registry("model family")

ROPE_TYPES = ("default", "linear", "llama3")  # rotary scalings that the Megatron model computes as transformers does


class ModelFamily:
    """The dense decoder: pre-norm, rotary, grouped queries, gated SiLU, no biases, RMSNorm."""

    model_type: ClassVar[str]
    hf_class: ClassVar[str]  # what config.json names under "architectures"
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False

    # Hugging Face config <-> Architecture. Configs come as plain dicts (`PretrainedConfig.to_dict`).

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        """Read a Hugging Face config.

        Raises:
            ConfigError: the config asks for something this decoder does not compute.
        """
        self.check(config)
        heads = config["num_attention_heads"]
        rope = dict(config["rope_parameters"])
        theta = rope.pop("rope_theta")
        return Architecture(
            family=self.model_type,
            num_layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            tied=config["tie_word_embeddings"],
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            norm_eps=config["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=() if rope["rope_type"] == "default" else tuple(sorted(rope.items())),
            max_positions=config["max_position_embeddings"],
            experts=self.experts(config),
        )

    def experts(self, config: Mapping[str, Any]) -> Experts | None:
        """The mixture-of-experts part of a Hugging Face config; None in dense families."""
        return None

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        """The inverse of `architecture`: fields of the Hugging Face config."""
        rope = dict(architecture.rope_scaling) or {"rope_type": "default"}
        return {
            "architectures": [self.hf_name(architecture)],
            "num_hidden_layers": architecture.num_layers,
            "hidden_size": architecture.hidden,
            "intermediate_size": architecture.ffn,
            "num_attention_heads": architecture.num_heads,
            "num_key_value_heads": architecture.num_kv_heads,
            "head_dim": architecture.head_dim,
            "vocab_size": architecture.vocab,
            "tie_word_embeddings": architecture.tied,
            "rms_norm_eps": architecture.norm_eps,
            "rope_parameters": {"rope_theta": architecture.rope_theta, **rope},
            "max_position_embeddings": architecture.max_positions,
        }

    def hf_name(self, architecture: Architecture) -> str:
        """The class of `transformers` that a folder is loaded as."""
        if not architecture.score_head:
            return self.hf_class
        return self.hf_class.replace("ForCausalLM", "ForSequenceClassification")

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse what would silently be computed differently."""
        unsupported = {
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(config.get("attention_bias")),
            "mlp_bias": bool(config.get("mlp_bias")),
            "sliding_window": config.get("sliding_window") is not None,
            "quantization_config": config.get("quantization_config") is not None,
        }
        for key, refused in unsupported.items():
            if refused:
                raise ConfigError(
                    f"{self.model_type} config has {key}={config[key]!r}, which this decoder does not compute: "
                    f"use a checkpoint without it, or extend megatron_rl/models/{self.model_type}.py"
                )
        rope_type = config["rope_parameters"].get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ConfigError(f"rope_type {rope_type!r} is not supported: expected one of {', '.join(ROPE_TYPES)}")

    # Parameters

    def embedding(self, a: Architecture) -> Parameter:
        return VocabularyRows(
            "model.embed_tokens.weight",
            a.vocab,
            a.hidden,
            megatron_name="embedding.word_embeddings.weight",
            rollout_name="model.embed_tokens.weight",
        )

    def output(self, a: Architecture) -> Parameter:
        """The output layer. Tied, it is one more copy of the embedding (Megatron's last pipeline stage)."""
        if a.score_head:
            return Replicated("score.weight", (1, a.hidden), "output_layer.weight")
        name = "model.embed_tokens.weight" if a.tied else "lm_head.weight"
        return VocabularyRows(
            name, a.vocab, a.hidden, megatron_name="output_layer.weight", rollout_name="lm_head.weight"
        )

    def final_norm(self, a: Architecture) -> Parameter:
        return Replicated("model.norm.weight", (a.hidden,), "decoder.final_layernorm.weight")

    def layer(self, a: Architecture, index: int) -> Iterable[Parameter]:
        """The parameters of one layer; names lack the layer's prefix."""
        yield from self.attention(a)
        if a.experts is None or index in a.experts.dense_layers:
            yield from self.dense_mlp(a)
        else:
            yield from self.expert_mlp(a, a.experts)

    def attention(self, a: Architecture) -> Iterable[Parameter]:
        fused_norm = "self_attention.linear_qkv.layer_norm_weight"
        yield Replicated("input_layernorm.weight", (a.hidden,), "input_layernorm.weight", fused_norm)
        for suffix in ("weight", "bias") if a.qkv_bias else ("weight",):
            yield FusedQKV(suffix, a.num_heads, a.num_kv_heads, a.head_dim, a.hidden)
        for letter in "qk" if a.qk_norm else "":
            name = f"self_attention.{letter}_layernorm.weight"
            yield Replicated(f"self_attn.{letter}_norm.weight", (a.head_dim,), name)
        inputs = a.num_heads * a.head_dim
        yield InputColumns("self_attn.o_proj.weight", a.hidden, inputs, "self_attention.linear_proj.weight")

    def dense_mlp(self, a: Architecture) -> Iterable[Parameter]:
        norm = "post_attention_layernorm.weight"
        yield Replicated(norm, (a.hidden,), "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        yield GateUp(a.ffn, a.hidden)
        yield InputColumns("mlp.down_proj.weight", a.hidden, a.ffn, "mlp.linear_fc2.weight")

    def expert_mlp(self, a: Architecture, experts: Experts) -> Iterable[Parameter]:
        yield Replicated("post_attention_layernorm.weight", (a.hidden,), "pre_mlp_layernorm.weight")
        yield Replicated("mlp.gate.weight", (experts.num_experts, a.hidden), "mlp.router.weight")
        yield RoutedExperts(experts.num_experts, experts.ffn, a.hidden)


def family_of(model_type: str) -> ModelFamily:
    """The family of a Hugging Face model type.

    Raises:
        ConfigError: no such family.
    """
    if model_type not in FAMILIES:
        known = list(FAMILIES)
        raise ConfigError(
            f"model type {model_type!r} is not supported.{nearest(model_type, known)} Supported: {', '.join(known)}. "
            "To add one, state its differences from the dense decoder in megatron_rl/models/<model_type>.py"
        )
    return FAMILIES[model_type]()


def matching_family(qkv_bias: bool, qk_norm: bool, has_experts: bool) -> ModelFamily:
    """The family a Megatron model without a Hugging Face config is exported as.

    Raises:
        ConfigError: no supported family has this combination.
    """
    for name in FAMILIES:
        family = FAMILIES[name]
        mixes = family.experts is not ModelFamily.experts
        if (family.qkv_bias, family.qk_norm, mixes) == (qkv_bias, qk_norm, has_experts):
            return family()
    raise ConfigError(
        f"no Hugging Face family has qkv_bias={qkv_bias}, qk_norm={qk_norm}, experts={has_experts}: "
        "Llama has none of them, Qwen2 the bias, Qwen3 the norm, Qwen3-MoE norm and experts"
    )
