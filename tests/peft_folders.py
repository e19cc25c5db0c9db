"""Folders of adapters as PEFT writes them, and what they mean, by PEFT's rules and not by the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# Of each model: fields of adapter_config.json, and the modules that have adapters. Ranks and scales differ by pattern,
# and some layers have none.
FOLDERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "one": (
        {
            "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"],
            "layers_to_transform": [0, 2, 3],
            "rank_pattern": {"v_proj": 3, r"layers\.2\.mlp\.down_proj": 5},
            "alpha_pattern": {"v_proj": 9},
        },
        [
            f"layers.{layer}.{name}"
            for layer in (0, 2, 3)
            for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
        ],
    ),
    "latent": (
        {
            "target_modules": r"model\.layers\.\d+\.self_attn\.(q_a_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "shared_experts.up_proj.weight"],
            "rank_pattern": {"kv_b_proj": 3, "experts.gate_up_proj": 2},
            "use_rslora": True,
        },
        [
            *(f"layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in ("q_a", "kv_b", "o")),
            *(f"layers.{i}.self_attn.kv_a_proj_with_mqa" for i in (0, 1)),
            "layers.1.mlp.experts.gate_up_proj",
            "layers.1.mlp.experts.down_proj",
            "layers.1.mlp.shared_experts.up_proj",
        ],
    ),
    "shared": (
        {"target_modules": ["k_proj", "gate_proj", "up_proj", "down_proj"], "exclude_modules": r".*shared_expert\..*"},
        [
            *(f"layers.{i}.self_attn.k_proj" for i in (0, 1)),
            *(f"layers.{i}.mlp.experts.{e}.{n}_proj" for i in (0, 1) for e in range(4) for n in ("gate", "up", "down")),
        ],
    ),
    "oss": (
        {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["mlp.experts.down_proj"], "alpha_pattern": {}},
        [
            *(f"layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in ("q", "o")),
            *(f"layers.{i}.mlp.experts.down_proj" for i in (0, 1)),
        ],
    ),
}
RANK, ALPHA = 4, 6.0


def write_folder(folder: Path, kind: str, model: Any) -> None:
    """Random A and B for the modules of a model of `transformers`."""
    fields, modules = FOLDERS[kind]
    generator, tensors = torch.Generator().manual_seed(8), {}
    parameters = dict(model.named_parameters())
    for module in modules:
        rank, experts, shape, name = rank_of(kind, module), 1, None, f"model.{module}"
        parent, _, last = name.rpartition(".")
        if name in parameters:  # stacked experts
            experts, *shape = parameters[name].shape
            shape = shape[::-1] if kind == "oss" else shape
            both = {"gate_up_proj", "down_proj"} <= {one.rpartition(".")[2] for one in modules if "experts." in one}
            name = f"{parent}.base_layer" if last == "gate_up_proj" and both else parent
        elif f"{name}.weight" in parameters:
            shape = parameters[f"{name}.weight"].shape
        else:  # a numbered expert, which `transformers` has stacked
            up, down = (parameters[f"{parent.rpartition('.')[0]}.{one}"].shape for one in ("gate_up_proj", "down_proj"))
            shape = (up[1] // 2, up[2]) if last != "down_proj" else down[1:]
        a = torch.randn(rank * experts, shape[1], generator=generator) * 0.1
        b = torch.randn(shape[0], rank * experts, generator=generator) * 0.1
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def rank_of(kind: str, module: str) -> int:
    ranks = {"v_proj": 3, "layers.2.mlp.down_proj": 5} if kind == "one" else {}
    ranks = {"kv_b_proj": 3, "experts.gate_up_proj": 2} if kind == "latent" else ranks
    return next((rank for name, rank in ranks.items() if module.endswith(name)), RANK)


def factor_of(kind: str, module: str) -> float:
    if kind == "latent":
        return ALPHA / rank_of(kind, module) ** 0.5
    return (9.0 if kind == "one" and module.endswith("v_proj") else ALPHA) / rank_of(kind, module)


def peft_update(adapters: dict[str, Tensor], name: str, weight: Tensor) -> Tensor | None:
    """B A as PEFT computes it: `lora/layer.py` ``Linear`` and ``ParamWrapper.get_delta_weight``, which wraps the second
    parameter of a module of experts around the first."""
    module, _, parameter = name.rpartition(".")
    inner = ".base_layer" if parameter == "gate_up_proj" else ""
    key = f"base_model.model.{module}{inner}.lora_"
    if parameter.endswith("bias") or f"{key}A.weight" not in adapters:
        return None
    a, b = (adapters[f"{key}{letter}.weight"].double() for letter in "AB")
    if weight.dim() == 2:
        return b @ a
    a, b = a.reshape(len(weight), -1, a.shape[-1]), b.reshape(b.shape[0], -1, len(weight))
    transposed = weight.shape[1] == a.shape[-1] and weight.shape[2] == b.shape[0]
    return torch.einsum("o r e, e r i -> e i o" if transposed else "o r e, e r i -> e o i", b, a)


def numbered_update(given: dict[str, Tensor], name: str) -> Tensor | None:
    """Of stacked experts from a folder that numbers them."""
    parent, _, parameter = name.rpartition(".")
    halves = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
    if f"base_model.model.{parent}.0.{halves[0]}.lora_A.weight" not in given:
        return None
    experts = []
    for expert in range(4):
        keys = [f"base_model.model.{parent}.{expert}.{half}.lora_" for half in halves]
        experts.append(torch.cat([given[f"{k}B.weight"].double() @ given[f"{k}A.weight"].double() for k in keys]))
    return torch.stack(experts)
