"""Qwen3, dense: the dense decoder with RMSNorm over each query and key head."""

from __future__ import annotations

from megatron_rl.models.family import FAMILIES, ModelFamily


@FAMILIES.register("qwen3")
class Qwen3(ModelFamily):
    """RMSNorm over each query and key head."""

    model_type = "qwen3"
    hf_class = "Qwen3ForCausalLM"
    qk_norm = True
