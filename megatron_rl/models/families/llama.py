"""Llama 2 and 3, and every model published under their model type: the dense decoder itself."""

from __future__ import annotations

from megatron_rl.models.family import FAMILIES, ModelFamily


@FAMILIES.register("llama")
class Llama(ModelFamily):
    """No difference from the dense decoder."""
