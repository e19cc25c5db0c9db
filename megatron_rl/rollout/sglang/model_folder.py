"""The Hugging Face folder that a server starts from: config and tokenizer; its weights come by a push."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.models import Architecture, hf_config_from, logical_tensors
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.rollout.sglang.server import ServerStartError

# Families of which SGLang makes no dense layer (its Qwen2MoeDecoderLayer and Qwen3MoeDecoderLayer).
EXPERTS_EVERYWHERE = ("qwen2_moe", "qwen3_moe")
WINDOWED = ("gemma2", "gemma3_text", "gpt_oss")  # families whose windows SGLang computes
CPU_INTERMEDIATE_UNIT = 32  # a CPU server pads intermediate sizes to a multiple of this times tp


def write_model_folder(folder: Path, architecture: Architecture, tokenizer: Any | None, dtype: str) -> Path:
    """Write what `sglang.launch_server` needs to know of the model.

    Args:
        tokenizer: a `transformers` tokenizer; without one the server cannot look for stop texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(architecture, ModuleArchitecture):
        from megatron_rl.models.hf_config import module_config  # loads transformers, as the other does

        module_config(architecture, None, tokenizer, dtype).save_pretrained(folder)
    else:
        hf_config_from(architecture, tokenizer, dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def check_layers(architecture: Architecture) -> None:
    """Refuse layers that SGLang would build otherwise.

    Raises:
        ConfigError: the model has such.
    """
    dense = architecture.experts.dense_layers if architecture.experts is not None else ()
    if dense and architecture.family in EXPERTS_EVERYWHERE:
        raise ConfigError(
            f"layers {', '.join(map(str, dense))} of this {architecture.family} have a dense MLP (mlp_only_layers, "
            f"decoder_sparse_step), but SGLang builds experts in every layer of one: set actor.rollout.engine=local"
        )


def delivery_of(architecture: Architecture, chosen: str | None) -> str:
    """The way of weights to the servers.

    Raises:
        ConfigError: shards cannot be written directly, since nobody knows how SGLang cuts the model.
    """
    if not isinstance(architecture, ModuleArchitecture):
        return chosen or "direct"
    if chosen == "direct":
        raise ConfigError(
            f"delivery=direct, but model type {architecture.family!r} has no family here, so that only SGLang's own "
            "loader knows how it lays its weights out: leave delivery out, or choose disk"
        )
    return chosen or "flattened_bucket"


@contextlib.contextmanager
def explained_start(architecture: Architecture) -> Iterator[None]:
    """Where servers do not start with a model that has no family, say that SGLang may not know it.

    Raises:
        ConfigError: in place of `ServerStartError`.
    """
    try:
        yield
    except ServerStartError as error:
        if not isinstance(architecture, ModuleArchitecture):
            raise
        raise ConfigError(
            f"SGLang does not serve model type {architecture.family!r}, which has no family here ({error.cause}): set "
            f"actor.rollout.engine=transformers. All it said is in {error.log}"
        ) from None


def check_served(architecture: Architecture, max_context: int) -> None:
    """Refuse what SGLang would compute otherwise: its Llama, Mistral, Phi-3 and Mixtral (0.5.23) attend to every token
    before, its Gemma 2 has windows in every other layer from the first, its Llama leaves biases of feed-forward layers
    out in silence, and its Mixtral knows neither heads of a size of their own nor scaled rotary positions.

    Raises:
        ConfigError: the model has one of these.
    """
    a = architecture
    if isinstance(a, ModuleArchitecture):
        _check_module(a, max_context)
        return
    if a.mlp_bias and a.experts is None:
        raise ConfigError("SGLang computes Llama without the biases of its feed-forward layers: use engine: local")
    windowed = a.family in WINDOWED and (a.family == "gemma3_text" or a.full_layers == tuple(range(1, a.num_layers, 2)))
    if a.window is not None and not windowed and a.window < max_context:
        raise ConfigError(
            f"SGLang computes {a.family} models without their sliding window of {a.window} tokens, and contexts of "
            f"{max_context} are longer: set actor.rollout.options.server.context_length to {a.window} or less, or use "
            "engine: local"
        )
    scaling = dict(a.rope_scaling)
    ignored = ["attention_factor", *(["factor"] if scaling.get("rope_type") == "longrope" else [])]
    if found := [name for name in ignored if scaling.get(name) is not None]:
        raise ConfigError(f"SGLang ignores {' and '.join(found)} of rope_parameters={scaling}: use engine: local")
    original = scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type") == "longrope" and isinstance(original, int) and max_context > original:
        raise ConfigError(
            f"SGLang turns all sequences of a batch by LongRoPE's long frequencies where one is longer than {original} "
            f"tokens: set actor.rollout.options.server.context_length to {original} or less, or use engine: local"
        )
    if a.family in ("gemma", "gemma2") and a.rope_scaling:
        raise ConfigError(f"SGLang computes {a.family} with plain rotary positions, not {scaling}: use engine: local")
    if a.family == "gemma3_text" and a.attention_softcap is not None:
        raise ConfigError(
            f"SGLang computes Gemma 3 without attn_logit_softcapping={a.attention_softcap}: use engine: local"
        )
    if a.family == "gemma" and a.qkv_bias:
        raise ConfigError("SGLang's Gemma has no biases in attention: use engine: local")
    if a.family == "mixtral" and (a.rope_scaling or a.head_dim * a.num_heads != a.hidden):
        raise ConfigError(
            f"SGLang computes Mixtral with heads of hidden / heads = {a.hidden // a.num_heads} channels and plain "
            f"rotary positions, but this one has head_dim={a.head_dim}, rope_scaling={dict(a.rope_scaling)}: use "
            "engine: local"
        )


def _check_module(architecture: ModuleArchitecture, max_context: int) -> None:
    """Of models without a family: SGLang's classes do not hand the bias of their output layer on to the logits (its Phi
    has one, and computes without it), and what they make of windows was compared by nobody."""
    if any(name.endswith("lm_head.bias") for name in logical_tensors(architecture)):
        raise ConfigError(
            f"SGLang computes {architecture.family} without the bias of its output layer: use engine: transformers"
        )
    config = json.loads(architecture.config_json)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    windowed = set(config.get("layer_types") or ("sliding_attention",)) != {"full_attention"}
    if window is not None and window < max_context and windowed:
        raise ConfigError(
            f"this {architecture.family} has a sliding window of {window} tokens, contexts of {max_context} are "
            "longer, and whether SGLang computes it in such a model was never compared: set "
            f"actor.rollout.options.server.context_length to {window} or less, or use engine: transformers"
        )


def check_cpu_layout(architecture: Architecture, tp: int) -> None:
    """Refuse what a CPU server would pad, and then hold in another layout than a GPU server does; and soft caps of
    attention scores, of which SGLang's attention in plain torch knows nothing.

    Raises:
        ConfigError: a size is not aligned, or scores are capped.
    """
    if architecture.attention_softcap is not None:
        raise ConfigError(
            f"SGLang on a CPU computes attention without its soft cap of {architecture.attention_softcap}: use "
            "engine: local, or a GPU"
        )
    if architecture.family == "gemma3_text" and architecture.rope_scaling:
        raise ConfigError("SGLang on a CPU computes Gemma 3 with plain rotary positions: use engine: local, or a GPU")
    if isinstance(architecture, ModuleArchitecture):
        return  # the server's own loader pads
    unit = CPU_INTERMEDIATE_UNIT * tp
    sizes = {
        "num_attention_heads": (architecture.num_heads, tp),
        "num_key_value_heads": (architecture.num_kv_heads, tp),
    }
    if architecture.experts is None:
        sizes["intermediate_size"] = (architecture.ffn, unit)
    else:
        sizes["moe_intermediate_size"] = (architecture.experts.ffn, unit)
    for name, (size, divisor) in sizes.items():
        if size % divisor:
            raise ConfigError(
                f"{name}={size} is not a multiple of {divisor}: at tp={tp} SGLang on a CPU would pad it and hold its "
                f"weights in a layout of its own. Choose another rollout tp, another model, or a GPU"
            )
