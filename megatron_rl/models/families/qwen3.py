"""Qwen3, dense."""

from __future__ import annotations

from megatron_rl.models.family import FAMILIES, ModelFamily


@FAMILIES.register("qwen3")
class Qwen3(ModelFamily):
    """RMSNorm over each query and key head; windows in some layers."""

    qk_norm = True
    windowed = names_windows = counts_windows = True
