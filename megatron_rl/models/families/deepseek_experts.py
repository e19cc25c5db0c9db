"""`DeepseekExperts`: the mixture of experts of DeepSeek-V2 and V3, which GLM-4.5 and Kimi-K2 have too.

The first layers are dense, shared experts see every token. Layers behind the last one, which predict several tokens
(``num_nextn_predict_layers``), are neither loaded nor exported, as in `transformers`; exported configs say 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import ModelFamily


class DeepseekExperts(ModelFamily):
    """Routed experts of ``moe_intermediate_size``, and shared ones of a multiple of it."""

    expert_keys: ClassVar[Mapping[str, str]] = {
        "num_experts": "n_routed_experts",
        "experts_per_token": "num_experts_per_tok",
        "ffn": "moe_intermediate_size",
        "normalize_weights": "norm_topk_prob",
        "scaling": "routed_scaling_factor",
        "num_groups": "n_group",
        "chosen_groups": "topk_group",
    }
    exported: ClassVar[Mapping[str, Any]] = {"num_nextn_predict_layers": 0}

    def dense_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(range(min(config["first_k_dense_replace"], config["num_hidden_layers"])))

    def routing(self, config: Mapping[str, Any]) -> dict[str, Any]:
        shared = (config["n_shared_experts"] or 0) * config["moe_intermediate_size"]
        return {"shared_ffn": shared, "scoring": "sigmoid", "correction_bias": True}

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        experts = architecture.experts
        assert experts is not None
        count, first = len(experts.dense_layers), tuple(range(len(experts.dense_layers)))
        if experts.dense_layers != first or experts.shared_ffn % experts.ffn:
            raise ConfigError(
                f"dense layers {list(experts.dense_layers)} and a shared expert of {experts.shared_ffn}: a "
                f"{self.model_type} has its dense layers first, and shared experts of a multiple of {experts.ffn}"
            )
        shared = {"n_shared_experts": experts.shared_ffn // experts.ffn, "first_k_dense_replace": count}
        return super().config_fields(architecture) | shared | dict(self.exported)
