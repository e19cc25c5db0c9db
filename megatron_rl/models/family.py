"""`ModelFamily`: the dense Llama decoder, and the places where a Hugging Face model type may differ from it.

A family translates a Hugging Face config to an `Architecture` and back, and composes the description of each layer
(`models/description.py`) from it. A new family is a subclass in its own file below ``families`` that states its
differences, with one registry line, imported by ``families/__init__.py``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture, Experts
from megatron_rl.models.components.attention import GroupedQueryAttention
from megatron_rl.models.components.embedding import Embedding, OutputLayer, ValueOutput
from megatron_rl.models.components.experts import ExpertMLP
from megatron_rl.models.components.mla import LatentAttention
from megatron_rl.models.components.mlp import DenseMLP
from megatron_rl.models.components.norm import Norm
from megatron_rl.models.components.position import SCALINGS, Rotary, Scaling
from megatron_rl.models.description import LayerDescription, ModelDescription
from megatron_rl.models.routed_experts import EXPERT_NAMES, ExpertNames
from megatron_rl.registry import Registry, nearest

FAMILIES: Registry[type[ModelFamily]] = Registry("model family")

# Field of Architecture -> key of config.json.
KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "tied": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
# Field of Experts -> key of config.json, as most mixtures of experts name it.
EXPERT_KEYS = {
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "ffn": "moe_intermediate_size",
    "normalize_weights": "norm_topk_prob",
}
# Field of Architecture -> key of config.json, where scores and logits are bent as Gemma 2 does.
BENDING = {
    "query_scalar": "query_pre_attn_scalar",
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}
FULL, SLIDING = "full_attention", "sliding_attention"  # the values of ``layer_types`` that are computed
RENAMED = {"num_experts": "num_local_experts"}  # keys that transformers 5 writes under another name


class NoFamilyError(ConfigError):
    """No family here computes what a Hugging Face config describes; its module in `transformers` may."""


class ModelFamily:
    """The dense decoder: pre-norm, rotary, grouped queries, gated SiLU, no biases, RMSNorm.

    Args:
        model_type: Hugging Face's name of the family.
    """

    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    names_head_dim: ClassVar[bool] = True  # the config has ``head_dim`` also where it is hidden / heads
    turns_part: ClassVar[bool] = False  # the config may have a ``partial_rotary_factor``
    fused_in_file: ClassVar[bool] = False  # files have one qkv_proj and one gate_up_proj
    windowed: ClassVar[bool] = False  # the config may have a ``sliding_window``
    names_windows: ClassVar[bool] = False  # and says by ``layer_types`` which layers have it; otherwise all do
    counts_windows: ClassVar[bool] = False  # and, for older readers, how many at the beginning do not, as Qwen's do
    biased_output: ClassVar[bool] = False  # where ``bias_key`` is set, the output projection has a bias, too
    bends: ClassVar[bool] = False  # the config has ``query_pre_attn_scalar`` and ``*_logit_softcapping``
    activations: ClassVar[tuple[str, ...]] = ("silu",)  # that are computed; an exported config names the last
    activation_key: ClassVar[str] = "hidden_act"
    norm_offset: ClassVar[float] = 0.0  # norms multiply with this plus their weight
    sums_norms: ClassVar[bool] = True  # rollout engines hold that sum
    post_norms: ClassVar[bool] = False  # four norms in a layer
    scaled_embedding: ClassVar[bool] = False
    whole_embedding: ClassVar[bool] = False  # in rollout engines, on every rank
    mlp_bias_key: ClassVar[str] = ""  # the config says here whether the feed-forward layers have biases; "" = none has
    bias_key: ClassVar[str] = ""  # the config says here whether queries, keys and values have biases; "" = ``qkv_bias``
    expert_keys: ClassVar[Mapping[str, str]] = {}  # `EXPERT_KEYS`, or its like; {} = no experts
    expert_names: ClassVar[ExpertNames] = EXPERT_NAMES
    published_code: ClassVar[str] = ""  # in its stead `transformers` has the family: an ``auto_map`` to it is ignored
    exported: ClassVar[Mapping[str, Any]] = {}  # what an exported config says, whatever the one that was loaded said

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    @property
    def hf_class(self) -> str:
        """What config.json names under "architectures"."""
        return f"{type(self).__name__}ForCausalLM"

    def hf_name(self, architecture: Architecture) -> str:
        """The class of `transformers` that a folder is loaded as."""
        if not architecture.value_model:
            return self.hf_class
        return self.hf_class.replace("ForCausalLM", "ForSequenceClassification")

    # Hugging Face config <-> Architecture. Configs come as plain dicts (`PretrainedConfig.to_dict`).

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        """Read a Hugging Face config.

        Raises:
            ConfigError: the config asks for something this decoder does not compute.
        """
        self.check(config)
        heads = config["num_attention_heads"]
        implied = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads}
        given = {key: config.get(key) or implied[key] if key in implied else config[key] for key in KEYS.values()}
        biased = bool(config[self.bias_key]) if self.bias_key else self.qkv_bias
        window, full_layers = self.windows(config)
        return Architecture(
            family=self.model_type,
            **{ours: given[key] for ours, key in KEYS.items()},
            qkv_bias=biased,
            o_bias=biased and self.biased_output,
            mlp_bias=bool(self.mlp_bias_key and config[self.mlp_bias_key]),
            qk_norm=self.qk_norm,
            **self.rope_fields(config),
            experts=self.experts(config),
            window=window,
            full_layers=full_layers,
            activation=config[self.activation_key],
            norm_offset=self.norm_offset,
            post_norms=self.post_norms,
            scaled_embedding=self.scaled_embedding,
            **{ours: config[key] for ours, key in BENDING.items() if self.bends},
        )

    def rope_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The rotary fields of `Architecture`."""
        rope = dict(config["rope_parameters"])
        theta, fraction = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
        fraction = 1.0 if fraction is None else fraction
        return {"rope_theta": theta, "rope_scaling": frozen_rope(rope), "rotary_fraction": fraction}

    def rope_parameters(self, a: Architecture) -> dict[str, Any]:
        """The inverse of `rope_fields`."""
        rope = {"rope_theta": a.rope_theta} | thawed_rope(a.rope_scaling)
        return rope | ({"partial_rotary_factor": a.rotary_fraction} if self.turns_part else {})

    def experts(self, config: Mapping[str, Any]) -> Experts | None:
        """The mixture-of-experts part of a Hugging Face config; None in dense families."""
        if not self.expert_keys:
            return None
        keys = {ours: RENAMED[key] if RENAMED.get(key) in config else key for ours, key in self.expert_keys.items()}
        given = {ours: config[key] for ours, key in keys.items()} | self.routing(config)
        return Experts(**given, dense_layers=self.dense_layers(config))

    def routing(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `Experts` that no key of the config holds, or not as it is."""
        return {}

    def windows(self, config: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
        """`Architecture.window` and `Architecture.full_layers`."""
        window = config.get("sliding_window") if self.windowed else None
        if window is None or not self.names_windows:
            return window, ()
        full = tuple(index for index, kind in enumerate(config["layer_types"]) if kind == FULL)
        return (window, full) if len(full) < config["num_hidden_layers"] else (None, ())

    def dense_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Layers of a mixture of experts that have none."""
        return ()

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        """The inverse of `architecture`: fields of the Hugging Face config."""
        a = architecture
        fields: dict[str, Any] = {key: getattr(a, ours) for ours, key in KEYS.items()}
        if not self.names_head_dim and a.head_dim * a.num_heads == a.hidden:
            del fields["head_dim"]
        fields |= {self.mlp_bias_key: a.mlp_bias} if self.mlp_bias_key else {}
        # SGLang and transformers 4 read it beside the other rotary parameters.
        fields |= {"partial_rotary_factor": a.rotary_fraction} if self.turns_part else {}
        fields |= {key: getattr(a, ours) for ours, key in BENDING.items() if self.bends}
        fields |= {self.bias_key: a.qkv_bias} if self.bias_key else {}
        fields |= {"sliding_window": a.window} if self.windowed else {}
        fields |= self._layer_types(a) if self.windowed and self.names_windows else {}
        fields |= {"architectures": [self.hf_name(a)], "rope_parameters": self.rope_parameters(a)}
        fields |= {self.activation_key: a.activation if a.activation in self.activations else self.activations[-1]}
        return fields | {key: getattr(a.experts, ours) for ours, key in self.expert_keys.items()}

    def _layer_types(self, a: Architecture) -> dict[str, Any]:
        windowed = [a.window is not None and index not in a.full_layers for index in range(a.num_layers)]
        first = windowed.index(True) if any(windowed) else a.num_layers
        counted = {"use_sliding_window": a.window is not None, "max_window_layers": first}
        kinds = [SLIDING if one else FULL for one in windowed]
        return {"layer_types": kinds} | (counted if self.counts_windows else {})

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise ConfigError for config fields that would silently change what is computed."""
        window = config.get("sliding_window")
        unsupported = {
            self.activation_key: config.get(self.activation_key, "silu") not in self.activations,
            "attention_bias": bool(config.get("attention_bias")) and self.bias_key != "attention_bias",
            "mlp_bias": bool(config.get("mlp_bias")) and not self.mlp_bias_key,
            "use_bidirectional_attention": bool(config.get("use_bidirectional_attention")),
            "sliding_window": window is not None and (not self.windowed or window < 1),
            "layer_types": not {FULL, SLIDING}.issuperset(config.get("layer_types") or ()),
            "quantization_config": config.get("quantization_config") is not None,
        }
        for key, refused in unsupported.items():
            if refused:
                raise NoFamilyError(
                    f"{self.model_type} config has {key}={config[key]!r}, which this decoder does not compute: "
                    f"use a checkpoint without it, or extend megatron_rl/models/families/{self.model_type}.py"
                )
        self.check_rope(config["rope_parameters"])

    def check_rope(self, rope: Mapping[str, Any]) -> None:
        """Raise ConfigError for rotary parameters that are not computed."""
        rope_type, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor")
        if part is not None and not self.turns_part and part != 1.0:
            raise ConfigError(
                f"{self.model_type} config has partial_rotary_factor={part}, which {self.hf_class} ignores"
            )
        if rope_type not in SCALINGS:
            raise NoFamilyError(f"rope_type {rope_type!r} is not supported: expected one of {', '.join(SCALINGS)}")

    # Architecture -> description

    def describe(self, a: Architecture) -> ModelDescription:
        """The whole decoder, composed."""
        scale = a.hidden**0.5 if a.scaled_embedding else 1.0
        embedding = Embedding(a.vocab, a.hidden, scale=scale, whole_in_rollout=self.whole_embedding)
        tied = {"hf": embedding.hf} if a.tied else {}
        output = OutputLayer(a.vocab, a.hidden, softcap=a.logit_softcap, **tied)
        return ModelDescription(
            family=self.model_type,
            embedding=embedding,
            layers=tuple(self.layer(a, index) for index in range(a.num_layers)),
            final_norm=self.norm(a, "model.norm.weight"),
            output=ValueOutput(a.hidden) if a.value_model else output,
        )

    def layer(self, a: Architecture, index: int) -> LayerDescription:
        """The ``index``-th layer."""
        return LayerDescription(
            attention_norm=self.norm(a, "input_layernorm.weight"),
            attention=self.attention(a, index),
            mlp_norm=self.norm(a, "post_attention_layernorm.weight"),
            mlp=self.mlp(a, index),
        )

    def norm(self, a: Architecture, hf: str, size: int | None = None) -> Norm:
        """The norm of this Hugging Face name, over the hidden size unless another is given."""
        return Norm(hf, size or a.hidden, a.norm_eps, a.norm_offset, summed_in_rollout=self.sums_norms)

    def rotary(self, a: Architecture, index: int) -> Rotary:
        """The rotary positions of the ``index``-th layer."""
        dim = int(a.head_dim * a.rotary_fraction)
        if a.window_theta is not None and a.window is not None and index not in a.full_layers:
            return Rotary(dim, a.window_theta)
        return Rotary(dim, a.rope_theta, a.rope_scaling, a.max_positions if a.rope_scaling else 0)

    def attention(self, a: Architecture, index: int) -> GroupedQueryAttention | LatentAttention:
        """The attention of the ``index``-th layer."""
        q_norm, k_norm = (
            self.norm(a, f"self_attn.{letter}_norm.weight", a.head_dim) if a.qk_norm else None for letter in "qk"
        )
        window = None if index in a.full_layers else a.window
        return GroupedQueryAttention(
            a.hidden,
            a.num_heads,
            a.num_kv_heads,
            a.head_dim,
            self.rotary(a, index),
            a.qkv_bias,
            q_norm,
            k_norm,
            window,
            o_bias=a.o_bias,
            scale=None if a.query_scalar is None else a.query_scalar**-0.5,
            softcap=a.attention_softcap,
            sinks=a.sinks,
            fused_in_file=self.fused_in_file,
        )

    def mlp(self, a: Architecture, index: int) -> DenseMLP | ExpertMLP:
        """The feed-forward layer, or the experts, of the ``index``-th layer."""
        if a.experts is None or index in a.experts.dense_layers:
            return DenseMLP(a.hidden, a.ffn, self.fused_in_file, a.activation, a.mlp_bias)
        return ExpertMLP(a.hidden, a.experts, self.expert_names)


def family_of(model_type: str) -> ModelFamily:
    """The family of a Hugging Face model type.

    Raises:
        ConfigError: no such family.
    """
    if model_type not in FAMILIES:
        known = list(FAMILIES)
        meant = "" if model_type in CONFIG_MAPPING else nearest(model_type, known)  # another model is no misspelling
        raise NoFamilyError(
            f"model type {model_type!r} is not supported.{meant} Supported: {', '.join(known)}. "
            "To add one, state its differences from the dense decoder in megatron_rl/models/families/<model_type>.py"
        )
    return FAMILIES[model_type](model_type)


@functools.lru_cache(maxsize=64)
def describe(architecture: Architecture) -> ModelDescription:
    """The description of ``architecture``, composed by its family."""
    return family_of(architecture.family).describe(architecture)


def in_a_family(architecture: Architecture) -> Architecture:
    """``architecture`` as the first family whose config can express all of it, whatever its ``family`` says: the family
    that a Megatron model without a Hugging Face config is exported as.

    Raises:
        ConfigError: no supported family can.
    """
    for name in FAMILIES:
        family, renamed = family_of(name), replace(architecture, family=name)
        if bool(family.expert_keys) == (architecture.experts is not None):
            with contextlib.suppress(ConfigError):  # this one cannot
                found = family.architecture(family.config_fields(renamed))
                if _without_idle(found) == _without_idle(renamed):
                    return found
    switches = [field for field in fields(architecture) if field.default is not MISSING]
    given = ((field.name, getattr(architecture, field.name), field.default) for field in switches)
    unlike = ", ".join(f"{name}={value}" for name, value, plain in given if value != plain)
    raise ConfigError(f"no Hugging Face family has {unlike} together: see the families in megatron_rl/models/families")


def frozen_rope(rope: Mapping[str, Any]) -> Scaling:
    """``rope_parameters`` without their base -> `Architecture.rope_scaling`."""
    if rope.get("rope_type", "default") == "default":
        return ()
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in sorted(rope.items()))


def thawed_rope(scaling: Scaling) -> dict[str, Any]:
    """The inverse of `frozen_rope`."""
    items = {key: list(value) if isinstance(value, tuple) else value for key, value in scaling}
    return items or {"rope_type": "default"}


def _without_idle(a: Architecture) -> Architecture:
    """Without the dense feed-forward size where every layer has experts: nothing uses it there."""
    return replace(a, ffn=0) if a.experts is not None and not a.experts.dense_layers else a
