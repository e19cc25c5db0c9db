"""The `Architecture` of a job's own model chunk, and what is known of each argument of `GPTModel` and `HybridModel`.

A chunk does not keep its arguments: they are read off its attributes, its rotary frequencies, its modules and its
parameters. As in `models/megatron_fields.py`, what is not known is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from megatron_rl.engines.megatron.hybrid_model import decoder_config, refused_pattern, rotary_of
from megatron_rl.engines.megatron.model.decoder_layers import decoder_layers
from megatron_rl.engines.megatron.model.expert_router import ExpertRouter
from megatron_rl.engines.megatron.model.latent_attention import LatentAttention
from megatron_rl.engines.megatron.model.rope import inverse_frequencies
from megatron_rl.models.architecture import Architecture, Experts
from megatron_rl.models.components.mla import LATENT_EPS
from megatron_rl.models.components.position import Scaling, yarn_mscale
from megatron_rl.models.family import in_a_family
from megatron_rl.models.megatron_architecture import architecture_from_megatron, refuse
from megatron_rl.models.megatron_fields import Refusal, refused_fields, shown

# argument -> what becomes of it. `refused_arguments` and `scaling_of` hold the rules.
ARGUMENTS: dict[str, str] = {
    "config": "field by field, below",
    "transformer_layer_spec": "checked by the classes of the modules and by the names of the parameters",
    "vocab_size": "taken over: rows of the padded vocabulary",
    "max_sequence_length": "taken over: max_position_embeddings",
    "pre_process": "must be what the place in the pipeline says",
    "post_process": "must be what the place in the pipeline says",
    "fp16_lm_cross_entropy": "free: Megatron's own loss is not used",
    "parallel_output": "free: the output layer is computed here",
    "share_embeddings_and_output_weights": "taken over: tie_word_embeddings",
    "position_embedding_type": "must be 'rope', or 'yarn': taken over, rope_type yarn, but not beside latent attention",
    "rotary_percent": "taken over: partial_rotary_factor",
    "rotary_base": "taken over: rope_theta",
    "rope_scaling": "taken over: rope_type llama3 with Megatron-Core's bounds",
    "rope_scaling_factor": "taken over: factor of rope_type llama3",
    "seq_len_interpolation_factor": "taken over: factor of rope_type linear; not together with rope_scaling",
    "scatter_embedding_sequence_parallel": "must be True with sequence_parallel",
    "mtp_block_spec": "must be None",
    "pg_collection": "free: read from parallel_state and checked",
    "vp_stage": "must be what the place in the pipeline says",
}

# Megatron-Core RotaryEmbedding._apply_scaling, which takes the factor alone
LLAMA3_BOUNDS: dict[str, object] = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

_OURS = "megatron_rl.engines.megatron.model."
_TORCH = frozenset(
    "torch.nn.modules." + name
    for name in (
        "container.ModuleList",
        "container.ModuleDict",
        "dropout.Dropout",
        "normalization.RMSNorm",
        "linear.Identity",
    )
)
_MEGATRON_NAMES = """
ColumnParallelLinear RowParallelLinear TEColumnParallelLinear TELayerNormColumnParallelLinear TERowParallelLinear
TELinear TEColumnParallelGroupedLinear TERowParallelGroupedLinear DotProductAttention TEDotProductAttention
FusedScaleMaskSoftmax SelfAttention IdentityOp IdentityFuncOp MLP TEFusedMLP MoELayer TopKRouter SequentialMLP
TEGroupedMLP TransformerLayer MoETransformerLayer TransformerBlock RotaryEmbedding VocabParallelEmbedding
LanguageModelEmbedding GPTModel HybridModel HybridStack MLPLayer GroupedMLP SharedExpertMLP
MLASelfAttention YarnRotaryEmbedding
"""  # GroupedMLP is refused with its own message
_MEGATRON = frozenset(_MEGATRON_NAMES.split())
_INSIDE = "transformer_engine."  # what Megatron's TE classes are made of


def own_experts(chunks: Sequence[nn.Module]) -> Experts | None:
    """How our own routers in a rank's bare chunks choose experts; None where there are none."""
    routers = (module for chunk in chunks for module in chunk.modules() if isinstance(module, ExpertRouter))
    return next((router.experts for router in routers), None)


def architecture_of_chunk(chunk: nn.Module, vocab: int, experts: Experts | None = None) -> Architecture:
    """The architecture of a job's bare chunk, from its configuration and from what its arguments left on it.

    Args:
        experts: from `own_experts` of the whole model, of which a chunk may have dense layers alone.

    Raises:
        ConfigError: no supported Hugging Face family computes it; the message names each field and argument.
    """
    refuse(refused_pattern(chunk))
    config = decoder_config(chunk)
    refuse(refused_fields(config) + refused_arguments(chunk))
    base, percent = rotary_of(chunk)
    experts = experts or own_experts([chunk])
    plain = architecture_from_megatron(
        config,
        vocab=vocab,
        tied=bool(chunk.share_embeddings_and_output_weights),
        rope_theta=base,
        max_positions=int(chunk.max_sequence_length),  # type: ignore[arg-type]
        in_family=experts is None,  # our own routers say what the configuration cannot
    )
    has_yarn = chunk.position_embedding_type == "yarn"
    plain = replace(plain, rotary_fraction=1.0 if has_yarn else percent)  # Megatron-Core's YaRN turns whole heads
    plain = replace(plain, experts=experts) if experts else plain
    scaling = yarn_of(chunk) if has_yarn else own_scaling(chunk)
    if plain.mla is not None:
        plain, scaling = _with_halves(plain, chunk), plain.rope_scaling
    if scaling is None:
        frequencies = frequencies_of(chunk)
        scaling = None if frequencies is None else scaling_of(plain, frequencies)
    if scaling is None:
        given = f"frequencies that rotary_base={base} does not give"
        expected = "rope_scaling (Llama 3's) or seq_len_interpolation_factor, not both"
        refuse([Refusal("rotary_pos_emb", given, expected)])
    return in_a_family(replace(plain, rope_scaling=scaling or ()))


def _with_halves(architecture: Architecture, chunk: nn.Module) -> Architecture:
    """With what our own latent attention says of the channels that turn together."""
    assert architecture.mla is not None
    own = [module for module in chunk.modules() if isinstance(module, LatentAttention)]
    return replace(architecture, mla=replace(architecture.mla, interleaved=own[0].interleaved)) if own else architecture


def _refused_latents(chunk: nn.Module) -> list[Refusal]:
    """What Megatron-Core's own latent attention computes otherwise than `transformers`, or holds otherwise here."""
    found = {}
    for name, module in chunk.named_modules():
        if isinstance(module, MLASelfAttention):
            config = module.config
            if config.layernorm_epsilon != LATENT_EPS:
                found["layernorm_epsilon"] = (
                    shown(config.layernorm_epsilon),
                    f"{LATENT_EPS} with multi_latent_attention: norms over latents have it in `transformers`",
                )
            if module.linear_kv_down_proj.weight.shape[0] != config.kv_lora_rank + config.qk_pos_emb_head_dim:
                found[f"module {name}"] = (
                    "projections into latents cut over tensor-parallel ranks",
                    "TransformerEngine's layer spec, or megatron_rl.engines.megatron.model.layer_spec, or tp=1",
                )
    return [Refusal(name, *parts) for name, parts in found.items()]


def refused_arguments(chunk: nn.Module) -> list[Refusal]:
    """The arguments of a bare chunk that are not taken over as they are, and modules of unknown classes."""
    found = []
    kind = chunk.position_embedding_type
    embedding = chunk._modules.get("embedding")
    learned = embedding is not None and embedding.add_position_embedding
    config: Any = chunk.config
    if kind not in ("rope", "yarn") or learned:
        given = "learned_absolute" if learned else kind
        found.append(Refusal("position_embedding_type", shown(given), "'rope' or 'yarn'"))
    if kind == "yarn" and config.multi_latent_attention:
        found.append(
            Refusal("position_embedding_type", "'yarn'", "'rope': latent attention has a rope_type of its own")
        )
    if kind == "rope" and _yarn_amplitude(config) != 1.0:
        given = shown(config.yarn_rotary_scaling_factor)
        found.append(Refusal("yarn_rotary_scaling_factor", given, "none, or position_embedding_type='yarn'"))
    if chunk._modules.get("mtp") is not None:
        found.append(Refusal("mtp_block_spec", "multi-token prediction layers", "None"))
    if embedding is not None and chunk.config.sequence_parallel and not embedding.scatter_to_sequence_parallel:  # type: ignore[union-attr]
        found.append(Refusal("scatter_embedding_sequence_parallel", "False", "True with sequence_parallel"))
    return found + _unknown_modules(chunk) + _refused_latents(chunk)


def _unknown_modules(chunk: nn.Module) -> list[Refusal]:
    found: dict[type, Refusal] = {}
    for name, module in chunk.named_modules():
        cls = type(module)
        if cls not in found and not _known(cls):
            given = f"{cls.__module__}.{cls.__qualname__}"
            found[cls] = Refusal(
                f"module {name or 'model'}", given, "the classes of Megatron-Core's GPT and hybrid layer specs"
            )
    if any(type(module).__name__ == "GroupedMLP" for module in chunk.modules()):
        expected = "SequentialMLP (moe_grouped_gemm=False) or TEGroupedMLP (TransformerEngine)"
        return [*found.values(), Refusal("moe_grouped_gemm", "True with the legacy GroupedMLP", expected)]
    return list(found.values())


def _known(cls: type) -> bool:
    """Itself, or a subclass that leaves the computation to a known class."""
    for ancestor in cls.__mro__:
        where = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if where.startswith((_OURS, _INSIDE)) or where in _TORCH:
            return True
        if ancestor.__module__.startswith("megatron.core."):
            return ancestor.__name__ in _MEGATRON
        if "forward" in vars(ancestor) or "__call__" in vars(ancestor):
            return False
    return False


def own_scaling(chunk: nn.Module) -> Scaling | None:
    """The scaling of a chunk whose core attentions turn (`model.rope.rotate_in_attention`); None = they do not."""
    cores = [layer.attention.self_attention.core_attention for layer in decoder_layers(chunk)]
    tables = [getattr(core, "rotary", None) for core in cores]
    found = {table.rotary for table in tables if table is not None}
    return next(iter(found)).scaling if len(found) == 1 else None


def yarn_of(chunk: nn.Module) -> Scaling:
    """The scaling of a `GPTModel` with ``position_embedding_type='yarn'``."""
    rotary: Any = chunk.rotary_pos_emb
    scaling: dict[str, object] = {
        "rope_type": "yarn",
        "factor": float(rotary.scaling_factor),
        "original_max_position_embeddings": int(rotary.original_max_position_embeddings),
        "beta_fast": float(rotary.beta_fast),
        "beta_slow": float(rotary.beta_slow),
        "truncate": bool(rotary.correction_range_round_to_int),
        "attention_factor": _yarn_amplitude(chunk.config),
    }
    return tuple(sorted(scaling.items()))


def _yarn_amplitude(config: Any) -> float:
    """What attention multiplies cosines and sines by: wherever the configuration has ``yarn_*``, whatever the type of
    positions (megatron.core ``_yarn_get_concentration_factor_from_config``)."""
    factor = getattr(config, "yarn_rotary_scaling_factor", None)
    if factor is None:
        return 1.0
    over, under = (getattr(config, name, None) for name in ("yarn_mscale", "yarn_mscale_all_dim"))
    return (
        yarn_mscale(factor) if over is None or under is None else yarn_mscale(factor, over) / yarn_mscale(factor, under)
    )


def frequencies_of(chunk: nn.Module) -> Tensor | None:
    """Radians per position of each pair of channels, ``[pairs]`` fp32 on the CPU; None = the chunk rotates nothing."""
    rotary: Any = chunk._modules.get("rotary_pos_emb")
    if getattr(rotary, "inv_freq", None) is None:
        return None
    return rotary.inv_freq.float().cpu() / (rotary.seq_len_interpolation_factor or 1.0)


def scaling_of(architecture: Architecture, found: Tensor) -> tuple[tuple[str, object], ...] | None:
    """The ``rope_scaling`` with which ``architecture`` has the frequencies ``found``; None = no known one."""
    plain = inverse_frequencies(_scaled(architecture, ()))
    if plain.shape != found.shape:
        return None
    factor = float(plain[-1] / found[-1])  # of the slowest pair, which every scaling stretches in full
    factor = round(factor) if abs(factor - round(factor)) < 1e-4 * factor else factor
    llama3 = LLAMA3_BOUNDS | {"factor": float(factor)}
    for scaling in ({}, {"factor": float(factor), "rope_type": "linear"}, llama3):
        items = tuple(sorted(scaling.items()))
        if torch.allclose(inverse_frequencies(_scaled(architecture, items)), found, rtol=1e-5, atol=0.0):
            return items
    return None


def _scaled(architecture: Architecture, scaling: tuple[tuple[str, object], ...]) -> Architecture:
    return replace(architecture, rope_scaling=scaling)
