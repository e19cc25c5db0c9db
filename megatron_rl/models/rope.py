"""Rotary embedding: inverse frequencies with the scalings that Hugging Face configs name, and who applies them.

Megatron-Core knows one scaling (Llama 3's, with fixed bounds), so the builder computes the frequencies here and hands
them over. Formulas follow transformers' ``modeling_rope_utils``. Models with our own core attention turn queries and
keys there (`rotate_in_attention`); Megatron's way builds the angles of packed sequences anew for each layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """``[head_dim / 2]`` fp32: radians per position of each pair of channels.

    Raises:
        ConfigError: a scaling other than none, "linear" or "llama3".
    """
    channels = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / (architecture.rope_theta ** (channels / architecture.head_dim))
    scaling = dict(architecture.rope_scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / _number(scaling, "factor")
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    raise ConfigError(f"rope_scaling type {kind!r} is not supported; supported: default, linear, llama3")


class RotaryTable:
    """Cosines and sines of all positions so far asked for; one for all layers of a model."""

    def __init__(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies
        self._table = torch.empty(2, 0, frequencies.numel())

    def __call__(self, length: int, device: torch.device) -> Tensor:
        """``[2, length or more, head_dim / 2]`` fp32."""
        if self._table.shape[1] < length or self._table.device != device:
            with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
                positions = torch.arange(-(-length // 128) * 128, device=device, dtype=torch.float32)
                angles = torch.outer(positions, self.frequencies.to(device))
                self._table = torch.stack([angles.cos(), angles.sin()])
        return self._table


class NoRotary(nn.Module):
    """In the place of `RotaryEmbedding`: gives Megatron's attention layers nothing to apply."""

    def get_rotary_seq_len(self, *_: object, **__: object) -> int:
        return 0

    def forward(self, *_: object, **__: object) -> None:
        return None


def rotate_in_attention(chunk: nn.Module, frequencies: Tensor) -> None:
    """Let the core attentions of ``chunk`` (a `GPTModel` of our local layer spec) apply the rotary embedding."""
    table = RotaryTable(frequencies)
    for layer in chunk.decoder.layers:  # type: ignore[union-attr]
        layer.self_attention.core_attention.rotary = table  # type: ignore[union-attr]
    chunk.rotary_pos_emb = NoRotary()


def _llama3(frequencies: Tensor, scaling: dict[str, object]) -> Tensor:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    factor, low, high = (_number(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _number(scaling, "original_max_position_embeddings")
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(is_between, between, stretched)


def _number(scaling: dict[str, object], name: str) -> float:
    value = scaling.get(name)
    if not isinstance(value, int | float):
        raise ConfigError(f"rope_scaling needs a number {name!r}, got {value!r} among {sorted(scaling)}")
    return float(value)
