"""Qwen3-MoE: Qwen3's attention, and routed experts without a shared one in all or some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.models.architecture import Architecture, Experts
from megatron_rl.models.family import FAMILIES
from megatron_rl.models.qwen3 import Qwen3


@FAMILIES.register("qwen3_moe")
class Qwen3Moe(Qwen3):
    """Routed experts."""

    model_type = "qwen3_moe"
    hf_class = "Qwen3MoeForCausalLM"

    def experts(self, config: Mapping[str, Any]) -> Experts:
        step, only_dense = config["decoder_sparse_step"], config["mlp_only_layers"] or []
        layers = range(config["num_hidden_layers"])
        return Experts(
            num_experts=config["num_local_experts"],  # transformers 5 writes num_experts under this name
            experts_per_token=config["num_experts_per_tok"],
            ffn=config["moe_intermediate_size"],
            normalize_weights=config["norm_topk_prob"],
            dense_layers=tuple(i for i in layers if i in only_dense or (i + 1) % step),
        )

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        experts = architecture.experts
        assert experts is not None, "a qwen3_moe architecture has experts"
        return super().config_fields(architecture) | {
            "num_experts": experts.num_experts,
            "num_experts_per_tok": experts.experts_per_token,
            "moe_intermediate_size": experts.ffn,
            "norm_topk_prob": experts.normalize_weights,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(experts.dense_layers),
        }
