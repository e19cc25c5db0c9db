"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from megatron_rl.models.family import FAMILIES, ModelFamily


@FAMILIES.register("qwen2")
class Qwen2(ModelFamily):
    """Biases on query, key and value; windows in some layers; no ``head_dim`` where it is hidden / heads."""

    qkv_bias = True
    names_head_dim = False
    windowed = names_windows = counts_windows = True
