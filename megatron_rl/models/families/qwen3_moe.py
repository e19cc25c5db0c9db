"""Qwen3-MoE: Qwen3's attention, and routed experts without a shared one in all or some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.models.families.qwen2_moe import Qwen2Moe
from megatron_rl.models.family import EXPERT_KEYS, FAMILIES, ModelFamily


@FAMILIES.register("qwen3_moe")
class Qwen3Moe(Qwen2Moe):
    """Routed experts; RMSNorm over each query and key head, and no biases."""

    qkv_bias = False
    bias_key = ""
    qk_norm = True
    names_head_dim = True
    expert_keys = EXPERT_KEYS
    expert_names = ModelFamily.expert_names

    def routing(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {}
