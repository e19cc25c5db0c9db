"""GLM-4.5 and GLM-4.6: DeepSeek's experts behind grouped-query attention of which a part of each head turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.components.experts import ExpertMLP
from megatron_rl.models.components.mlp import DenseMLP
from megatron_rl.models.families.deepseek_experts import DeepseekExperts
from megatron_rl.models.family import FAMILIES


@FAMILIES.register("glm4_moe")
class Glm4Moe(DeepseekExperts):
    """Biases on query, key and value, and norms over their heads, where the config says so."""

    names_head_dim = False
    turns_part = True
    bias_key = "attention_bias"

    def mlp(self, a: Architecture, index: int) -> DenseMLP | ExpertMLP:
        found = super().mlp(a, index)  # SGLang's Glm4MoeGate is fp32
        return replace(found, rollout_router_dtype=torch.float32) if isinstance(found, ExpertMLP) else found

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        return replace(super().architecture(config), qk_norm=config["use_qk_norm"])

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        return super().config_fields(architecture) | {"use_qk_norm": architecture.qk_norm}
