"""Gemma 3 without its eyes: norms of queries and keys, and a rotary base of their own in layers with a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families.gemma2 import Gemma2
from megatron_rl.models.family import FAMILIES, FULL, SLIDING, frozen_rope, thawed_rope


@FAMILIES.register("gemma3_text")
class Gemma3Text(Gemma2):
    """SGLang's embedding is whole on every rank, and its norms hold the weight of the file and nothing else."""

    keeps_sums = False
    whole_embedding = True
    qk_norm = True

    @property
    def hf_class(self) -> str:
        return "Gemma3ForCausalLM"

    def hf_name(self, architecture: Architecture) -> str:
        return "Gemma3TextForSequenceClassification" if architecture.value_model else self.hf_class

    def rope_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        full, windowed = (dict(config["rope_parameters"][kind]) for kind in (FULL, SLIDING))
        return {
            "rope_theta": full.pop("rope_theta"),
            "rope_scaling": frozen_rope(full),
            "window_theta": windowed["rope_theta"],
        }

    def rope_parameters(self, a: Architecture) -> dict[str, Any]:
        theta = a.rope_theta if a.window_theta is None else a.window_theta
        return {
            FULL: {"rope_theta": a.rope_theta} | thawed_rope(a.rope_scaling),
            SLIDING: {"rope_theta": theta, "rope_type": "default"},
        }

    def check_rope(self, rope: Mapping[str, Any]) -> None:
        super().check_rope(rope[FULL])
        if rope[SLIDING].get("rope_type", "default") != "default":
            raise ConfigError(f"{self.model_type} config scales positions in layers with a window: {rope[SLIDING]}")
