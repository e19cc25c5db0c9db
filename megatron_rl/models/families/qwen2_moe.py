"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, and routed experts beside a gated shared one in all or some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families.qwen2 import Qwen2
from megatron_rl.models.family import EXPERT_KEYS, FAMILIES
from megatron_rl.models.routed_experts import ExpertNames


@FAMILIES.register("qwen2_moe")
class Qwen2Moe(Qwen2):
    """Routed experts and a shared one."""

    bias_key = "qkv_bias"
    expert_keys = EXPERT_KEYS | {"shared_ffn": "shared_expert_intermediate_size"}
    expert_names = ExpertNames(shared="mlp.shared_expert.")
    windowed = names_windows = False

    def check(self, config: Mapping[str, Any]) -> None:
        idle = {} if config.get("use_sliding_window") else {"sliding_window": None}  # `transformers` writes 0
        super().check(dict(config) | idle)

    def routing(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"shared_gate": True}

    def dense_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        step, only_dense = config["decoder_sparse_step"], config["mlp_only_layers"] or []
        return tuple(i for i in range(config["num_hidden_layers"]) if i in only_dense or (i + 1) % step)

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        dense = architecture.experts.dense_layers if architecture.experts else ()
        return super().config_fields(architecture) | {"decoder_sparse_step": 1, "mlp_only_layers": list(dense)}
