"""Independent oracles for layouts: full logical tensors, and each system's shards made from them with view/cat/chunk.

Nothing here uses spans; the Megatron side follows the Hugging Face converters in Megatron-LM (view as groups, cat,
chunk), the SGLang side its weight loaders (chunk per projection, cat).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rl.models import Architecture, Experts, logical_tensors
from megatron_rl.models.architecture import MLA
from megatron_rl.models.pipeline import stage_layers
from megatron_rl.parallel import RankGrid

LLAMA = Architecture(
    family="llama",
    num_layers=4,
    hidden=24,
    ffn=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    vocab=50,
    tied=False,
)
QWEN2 = replace(LLAMA, family="qwen2", qkv_bias=True, tied=True)
QWEN3 = replace(LLAMA, family="qwen3", qk_norm=True, num_kv_heads=2)
QWEN3_MOE = replace(QWEN3, family="qwen3_moe", experts=Experts(8, 2, 16, dense_layers=(1,)))
QWEN2_MOE = replace(
    LLAMA,
    family="qwen2_moe",
    qkv_bias=True,
    experts=Experts(8, 2, 16, normalize_weights=False, shared_ffn=24, shared_gate=True, dense_layers=(1,)),
)
GLM4_MOE = replace(
    LLAMA,
    family="glm4_moe",
    qkv_bias=True,
    qk_norm=True,
    num_kv_heads=2,
    rotary_fraction=0.5,
    experts=Experts(
        8, 4, 16, shared_ffn=32, dense_layers=(0,), scoring="sigmoid", correction_bias=True, num_groups=4,
        chosen_groups=2, scaling=1.5,
    ),
)  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.8, "mscale_all_dim": 1.1,
    "original_max_position_embeddings": 16,
}  # fmt: skip
DEEPSEEK_V3 = replace(
    GLM4_MOE,
    family="deepseek_v3",
    qkv_bias=False,
    qk_norm=False,
    num_kv_heads=8,
    head_dim=12,
    rotary_fraction=1.0,
    rope_scaling=tuple(sorted(YARN.items())),
    mla=MLA(q_rank=16, kv_rank=20, nope_dim=4, rope_dim=8, value_dim=6),
    norm_eps=1e-5,
)
MOONLIGHT = replace(
    DEEPSEEK_V3,
    rope_scaling=(),
    mla=replace(DEEPSEEK_V3.mla, q_rank=None, interleaved=False),
    experts=replace(GLM4_MOE.experts, num_groups=1, chosen_groups=1),
)
DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    family="deepseek_v2",
    experts=replace(
        GLM4_MOE.experts, normalize_weights=False, scoring="softmax", correction_bias=False, group_scored_by=1
    ),
)
DEEPSEEK_V2_LITE = replace(
    DEEPSEEK_V2,
    experts=replace(DEEPSEEK_V2.experts, num_groups=1, chosen_groups=1, group_scored_by=2),
)
MISTRAL = replace(LLAMA, family="mistral", window=7)  # shorter than the sequences of the tests
QWEN2_WINDOWS = replace(QWEN2, window=7, full_layers=(1,))
MIXTRAL = replace(MISTRAL, family="mixtral", ffn=16, experts=Experts(8, 3, 16))
ALL = (LLAMA, QWEN2, QWEN3, QWEN3_MOE, MISTRAL, MIXTRAL, QWEN2_MOE, GLM4_MOE, DEEPSEEK_V3, DEEPSEEK_V2)


@dataclass(frozen=True)
class FileNames:
    """What the files of a family call the parts of a mixture of experts, within a layer."""

    mixture: str = "mlp."
    shared: str = "shared_experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def expert(self, full: dict[str, Tensor], layer: str, expert: int) -> tuple[Tensor, ...]:
        prefix = f"{layer}{self.mixture}experts.{expert}."
        return tuple(full[f"{prefix}{name}.weight"] for name in (self.gate, self.up, self.down))

    def shared_expert(self, full: dict[str, Tensor], layer: str) -> tuple[Tensor, ...]:
        return tuple(full[f"{layer}mlp.{self.shared}.{name}_proj.weight"] for name in ("gate", "up", "down"))


FILE_NAMES = {
    "mixtral": FileNames("block_sparse_moe.", gate="w1", up="w3", down="w2"),
    "qwen2_moe": FileNames(shared="shared_expert"),
}


def file_names(a: Architecture) -> FileNames:
    return FILE_NAMES.get(a.family, FileNames())


def random_logical(architecture: Architecture, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = logical_tensors(architecture)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def vocabulary_rows(full: Tensor, padded: int, rank: int, tp: int) -> Tensor:
    padding = full.new_zeros(padded - full.shape[0], full.shape[1])
    return torch.cat([full, padding]).chunk(tp)[rank]


def fused_halves(gate: Tensor, up: Tensor, rank: int, tp: int) -> Tensor:
    return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])


def megatron_qkv(a: Architecture, full: dict[str, Tensor], layer: int, suffix: str, rank: int, tp: int) -> Tensor:
    groups = []
    for letter in "qkv":
        tensor = full[f"model.layers.{layer}.self_attn.{letter}_proj.{suffix}"]
        groups.append(tensor.view(a.num_kv_heads, -1, *tensor.shape[1:]))
    joined = torch.cat(groups, dim=1).flatten(0, 1)
    return joined.chunk(tp)[rank]


def rollout_qkv(a: Architecture, full: dict[str, Tensor], layer: int, suffix: str, rank: int, tp: int) -> Tensor:
    parts = []
    for letter in "qkv":
        tensor = full[f"model.layers.{layer}.self_attn.{letter}_proj.{suffix}"]
        if letter != "q" and a.num_kv_heads < tp:
            repeated = tensor.view(a.num_kv_heads, a.head_dim, *tensor.shape[1:])
            tensor = repeated.repeat_interleave(tp // a.num_kv_heads, dim=0).flatten(0, 1)
        parts.append(tensor.chunk(tp)[rank])
    return torch.cat(parts)


def megatron_by_hand(a: Architecture, full: dict[str, Tensor], grid: RankGrid, rank: int, padded: int) -> dict:
    """Local-spec names -> tensors of one rank, chunks of the virtual pipeline prefixed."""
    sizes, at = grid.sizes, grid.coordinates(rank)
    out = {}
    for chunk in range(sizes.vpp):
        start = f"chunk{chunk}." if sizes.vpp > 1 else ""
        if at.pp == 0 and chunk == 0:
            rows = vocabulary_rows(full["model.embed_tokens.weight"], padded, at.tp, sizes.tp)
            out[start + "embedding.word_embeddings.weight"] = rows
        for local, layer in enumerate(stage_layers(a.num_layers, sizes.pp, sizes.vpp, at.pp, chunk)):
            for name, tensor in megatron_layer(a, full, grid, rank, layer).items():
                out[f"{start}decoder.layers.{local}.{name}"] = tensor
        if at.pp == sizes.pp - 1 and chunk == sizes.vpp - 1:
            out[start + "decoder.final_layernorm.weight"] = full["model.norm.weight"]
            head = full["model.embed_tokens.weight" if a.tied else "lm_head.weight"]
            if not a.tied or sizes.pp > 1:
                out[start + "output_layer.weight"] = vocabulary_rows(head, padded, at.tp, sizes.tp)
    return out


def megatron_layer(a: Architecture, full: dict[str, Tensor], grid: RankGrid, rank: int, layer: int) -> dict:
    at, tp, p = grid.coordinates(rank), grid.sizes.tp, f"model.layers.{layer}."
    out = {
        "input_layernorm.weight": full[p + "input_layernorm.weight"],
        "pre_mlp_layernorm.weight": full[p + "post_attention_layernorm.weight"],
        "self_attention.linear_proj.weight": full[p + "self_attn.o_proj.weight"].chunk(tp, dim=1)[at.tp],
    }
    if a.mla is not None:
        out |= {f"self_attention.{name}": tensor for name, tensor in megatron_latent(a, full, p, at.tp, tp).items()}
    else:
        out["self_attention.linear_qkv.weight"] = megatron_qkv(a, full, layer, "weight", at.tp, tp)
    if a.qkv_bias:
        out["self_attention.linear_qkv.bias"] = megatron_qkv(a, full, layer, "bias", at.tp, tp)
    if a.qk_norm:
        out["self_attention.q_layernorm.weight"] = full[p + "self_attn.q_norm.weight"]
        out["self_attention.k_layernorm.weight"] = full[p + "self_attn.k_norm.weight"]
    if a.experts is None or layer in a.experts.dense_layers:
        gate, up, down = (full[f"{p}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        out["mlp.linear_fc1.weight"] = fused_halves(gate, up, at.tp, tp)
        out["mlp.linear_fc2.weight"] = down.chunk(tp, dim=1)[at.tp]
        return out
    names = file_names(a)
    out["mlp.router.weight"] = full[f"{p}{names.mixture}gate.weight"]
    if a.experts.correction_bias:
        out["mlp.router.expert_bias"] = full[p + "mlp.gate.e_score_correction_bias"]
    if a.experts.shared_ffn:
        gate, up, down = names.shared_expert(full, p)
        out["mlp.shared_experts.linear_fc1.weight"] = fused_halves(gate, up, at.tp, tp)
        out["mlp.shared_experts.linear_fc2.weight"] = down.chunk(tp, dim=1)[at.tp]
    if a.experts.shared_gate:
        out["mlp.shared_experts.gate_weight"] = full[p + "mlp.shared_expert_gate.weight"]
    count, etp = a.experts.num_experts // grid.sizes.ep, grid.sizes.etp
    for local in range(count):
        gate, up, down = names.expert(full, p, at.ep * count + local)
        out[f"mlp.experts.local_experts.{local}.linear_fc1.weight"] = fused_halves(gate, up, at.etp, etp)
        out[f"mlp.experts.local_experts.{local}.linear_fc2.weight"] = down.chunk(etp, dim=1)[at.etp]
    return out


def megatron_latent(a: Architecture, full: dict[str, Tensor], p: str, rank: int, tp: int) -> dict[str, Tensor]:
    p += "self_attn."
    out = {
        "linear_kv_down_proj.weight": full[p + "kv_a_proj_with_mqa.weight"],
        "kv_layernorm.weight": full[p + "kv_a_layernorm.weight"],
        "linear_kv_up_proj.weight": full[p + "kv_b_proj.weight"].chunk(tp)[rank],
    }
    if a.mla.q_rank is None:
        return out | {"linear_q_proj.weight": full[p + "q_proj.weight"].chunk(tp)[rank]}
    return out | {
        "linear_q_down_proj.weight": full[p + "q_a_proj.weight"],
        "q_layernorm.weight": full[p + "q_a_layernorm.weight"],
        "linear_q_up_proj.weight": full[p + "q_b_proj.weight"].chunk(tp)[rank],
    }


def rollout_latent(a: Architecture, full: dict[str, Tensor], p: str, rank: int, tp: int) -> dict[str, Tensor]:
    p += "self_attn."
    down = full[p + "kv_a_proj_with_mqa.weight"]
    out = {
        p + "kv_a_layernorm.weight": full[p + "kv_a_layernorm.weight"],
        p + "kv_b_proj.weight": full[p + "kv_b_proj.weight"].chunk(tp)[rank],
    }
    if a.mla.q_rank is None:
        projections = {p + "q_proj.weight": full[p + "q_proj.weight"].chunk(tp)[rank]}
        return out | projections | {p + "kv_a_proj_with_mqa.weight": down}
    return out | {
        p + "fused_qkv_a_proj_with_mqa.weight": torch.cat([full[p + "q_a_proj.weight"], down]),
        p + "q_a_layernorm.weight": full[p + "q_a_layernorm.weight"],
        p + "q_b_proj.weight": full[p + "q_b_proj.weight"].chunk(tp)[rank],
    }


def rollout_by_hand(a: Architecture, full: dict[str, Tensor], rank: int, tp: int, ep: int, padded: int) -> dict:
    """SGLang's names -> tensors of one rank."""
    out = {
        "model.embed_tokens.weight": vocabulary_rows(full["model.embed_tokens.weight"], padded, rank, tp),
        "model.norm.weight": full["model.norm.weight"],
    }
    if not a.tied:
        out["lm_head.weight"] = vocabulary_rows(full["lm_head.weight"], padded, rank, tp)
    for layer in range(a.num_layers):
        p = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{p}{norm}.weight"] = full[f"{p}{norm}.weight"]
        for norm in ("q_norm", "k_norm") if a.qk_norm else ():
            out[f"{p}self_attn.{norm}.weight"] = full[f"{p}self_attn.{norm}.weight"]
        if a.mla is not None:
            out |= rollout_latent(a, full, p, rank, tp)
        for suffix in () if a.mla else ("weight", "bias") if a.qkv_bias else ("weight",):
            out[f"{p}self_attn.qkv_proj.{suffix}"] = rollout_qkv(a, full, layer, suffix, rank, tp)
        out[p + "self_attn.o_proj.weight"] = full[p + "self_attn.o_proj.weight"].chunk(tp, dim=1)[rank]
        if a.experts is None or layer in a.experts.dense_layers:
            gate, up, down = (full[f"{p}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            out[p + "mlp.gate_up_proj.weight"] = fused_halves(gate, up, rank, tp)
            out[p + "mlp.down_proj.weight"] = down.chunk(tp, dim=1)[rank]
        else:
            gate_name = f"{p}{file_names(a).mixture}gate.weight"
            out[gate_name] = full[gate_name]
            out |= rollout_experts(a, full, p, rank, tp, ep) | rollout_shared(a, full, p, rank, tp)
    return out


def rollout_shared(a: Architecture, full: dict[str, Tensor], p: str, rank: int, tp: int) -> dict:
    out = {}
    if a.experts.correction_bias:
        name = p + "mlp.gate.e_score_correction_bias"
        out[name] = full[name]
    if a.experts.shared_gate:
        name = p + "mlp.shared_expert_gate.weight"
        out[name] = full[name]
    if a.experts.shared_ffn:
        gate, up, down = file_names(a).shared_expert(full, p)
        prefix = f"{p}mlp.{file_names(a).shared}."
        out[prefix + "gate_up_proj.weight"] = fused_halves(gate, up, rank, tp)
        out[prefix + "down_proj.weight"] = down.chunk(tp, dim=1)[rank]
    return out


def rollout_experts(a: Architecture, full: dict[str, Tensor], p: str, rank: int, tp: int, ep: int) -> dict:
    ep_rank, moe_rank, moe_tp = rank // (tp // ep), rank % (tp // ep), tp // ep
    count, names = a.experts.num_experts // ep, file_names(a)
    w13, w2 = [], []
    for expert in range(ep_rank * count, (ep_rank + 1) * count):
        gate, up, down = names.expert(full, p, expert)
        w13.append(fused_halves(gate, up, moe_rank, moe_tp))
        w2.append(down.chunk(moe_tp, dim=1)[moe_rank])
    p += names.mixture + "experts."
    return {p + "w13_weight": torch.stack(w13), p + "w2_weight": torch.stack(w2)}
