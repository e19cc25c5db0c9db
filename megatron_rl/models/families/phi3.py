"""Phi-3 and Phi-4-mini: Llama's decoder, in files with fused projections."""

from __future__ import annotations

from typing import Any

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import FAMILIES, ModelFamily


@FAMILIES.register("phi3")
class Phi3(ModelFamily):
    """A sliding window; rotary positions of a part of each head (Phi-4-mini)."""

    published_code = "modeling_phi3."
    names_head_dim = False
    windowed = turns_part = fused_in_file = True

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        fields, original = super().config_fields(architecture), "original_max_position_embeddings"
        scaling = dict(architecture.rope_scaling)  # the config's own field wins over the one among the rope_parameters
        return fields | ({original: scaling[original]} if original in scaling else {})
