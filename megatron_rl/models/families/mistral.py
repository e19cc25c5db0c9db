"""Mistral: the dense decoder, with a sliding window where the config has one."""

from __future__ import annotations

from megatron_rl.models.family import FAMILIES, ModelFamily


@FAMILIES.register("mistral")
class Mistral(ModelFamily):
    """A sliding window."""

    windowed = True
