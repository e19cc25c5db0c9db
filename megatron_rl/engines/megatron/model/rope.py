"""Rotary embedding in Megatron's models, with the frequencies that a description gives.

Megatron-Core knows one scaling (Llama 3's, with fixed bounds), so the builder takes the frequencies from the
description. Models with our own core attention rotate queries and keys there (`rotate_in_attention`); Megatron's way
builds the angles of packed sequences anew for each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.components.position import Rotary
from megatron_rl.models.description import ModelDescription
from megatron_rl.models.family import describe


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """``[dim / 2]`` fp32: radians per position of each pair of channels; see `Rotary.inverse_frequencies`.

    Raises:
        ConfigError: an unknown scaling, or layers differ.
    """
    return describe(architecture).shared(lambda layer: layer.attention.rotary, "rotary positions").inverse_frequencies()


class CosSinTable:
    """Cosines and sines of all positions so far asked for; one for all layers that turn alike."""

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self._tables: dict[bool, Tensor] = {}

    def is_long(self, length: int) -> bool:
        """Whether a sequence of ``length`` tokens has the frequencies of long ones."""
        return self.rotary.switch is not None and length > self.rotary.switch

    def __call__(self, length: int, device: torch.device) -> Tensor:
        """For a sequence of ``length`` tokens: ``[2, length or more, dim / 2]`` fp32."""
        table = self._tables.get(self.is_long(length))
        if table is None or table.shape[1] < length or table.device != device:
            with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
                table = self.rotary.cos_sin(torch.arange(-(-length // 128) * 128, device=device), length)
            self._tables[self.is_long(length)] = table
        return table


class NoRotary(nn.Module):
    """In the place of `RotaryEmbedding`: gives Megatron's attention layers nothing to apply."""

    def get_rotary_seq_len(self, *_: object, **__: object) -> int:
        return 0

    def forward(self, *_: object, **__: object) -> None:
        return None


def rotate_in_attention(chunk: nn.Module, model: ModelDescription) -> None:
    """Let the core attentions of ``chunk`` (a `GPTModel` of our local layer spec) apply the rotary embedding, and what
    else Megatron-Core's configuration does not say of them."""
    tables: dict[Rotary, CosSinTable] = {}
    for layer in chunk.decoder.layers:  # type: ignore[union-attr]
        described = model.layers[layer.layer_number - 1].attention  # type: ignore[operator]
        rotary, core = described.rotary, layer.self_attention.core_attention  # type: ignore[union-attr]
        if rotary not in tables:
            tables[rotary] = CosSinTable(rotary)
        core.rotary, core.softcap, core.window = tables[rotary], described.softcap, described.window
        if described.scale is not None:
            core.softmax_scale = described.scale
    chunk.rotary_pos_emb = NoRotary()
