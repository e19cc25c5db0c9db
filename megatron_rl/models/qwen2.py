"""Qwen2 and Qwen2.5: the dense decoder with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import FAMILIES, ModelFamily


@FAMILIES.register("qwen2")
class Qwen2(ModelFamily):
    """Biases on query, key and value."""

    model_type = "qwen2"
    hf_class = "Qwen2ForCausalLM"
    qkv_bias = True

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        """Qwen2Config has no ``head_dim``; transformers reads it only where it is not hidden / heads."""
        fields = super().config_fields(architecture)
        if architecture.head_dim * architecture.num_heads == architecture.hidden:
            del fields["head_dim"]
        return fields
