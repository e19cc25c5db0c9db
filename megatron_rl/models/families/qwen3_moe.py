"""Qwen3-MoE: Qwen3's attention, and routed experts without a shared one in all or some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families.qwen3 import Qwen3
from megatron_rl.models.family import EXPERT_KEYS, FAMILIES


@FAMILIES.register("qwen3_moe")
class Qwen3Moe(Qwen3):
    """Routed experts."""

    expert_keys = EXPERT_KEYS
    windowed = names_windows = False

    def dense_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        step, only_dense = config["decoder_sparse_step"], config["mlp_only_layers"] or []
        return tuple(i for i in range(config["num_hidden_layers"]) if i in only_dense or (i + 1) % step)

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        dense = architecture.experts.dense_layers if architecture.experts else ()
        return super().config_fields(architecture) | {"decoder_sparse_step": 1, "mlp_only_layers": list(dense)}
