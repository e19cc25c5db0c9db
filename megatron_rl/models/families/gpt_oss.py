"""gpt-oss: attention sinks, windows in every other layer, biases, and experts with a clamped activation.

Files in bf16; those that are quantised (MXFP4) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from megatron_rl.config import ConfigError
from megatron_rl.models.activations import GATE_SLOPE
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import FAMILIES, ModelFamily
from megatron_rl.models.routed_experts import ExpertNames


@FAMILIES.register("gpt_oss")
class GptOss(ModelFamily):
    """Experts in every layer; weights of the chosen ones sum to 1."""

    bias_key = "attention_bias"
    biased_output = True
    windowed = names_windows = True
    expert_keys: ClassVar[Mapping[str, str]] = {
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "ffn": "intermediate_size",
        "clamp": "swiglu_limit",
    }
    expert_names = ExpertNames(router="mlp.router.weight")

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        expected = {"swiglu_alpha": GATE_SLOPE, "attention_bias": True}
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise ConfigError(f"{self.model_type} config has {key}={config[key]!r}; supported is {value!r}")

    def routing(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"biased": True}

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        return replace(super().architecture(config), mlp_bias=True, sinks=True)

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        if not architecture.sinks:
            raise ConfigError("a gpt_oss has attention sinks")
        return super().config_fields(architecture)
