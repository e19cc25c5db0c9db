"""`Rotary`: rotary positions, with the frequency scalings that Hugging Face configs name.

Formulas follow transformers' ``modeling_rope_utils``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.config import ConfigError


@dataclass(frozen=True, slots=True)
class Rotary:
    """Dimension i of a head turns with dimension i + dim / 2 (the half-split form of Hugging Face)."""

    dim: int
    theta: float
    scaling: tuple[tuple[str, object], ...] = ()  # Hugging Face rope_scaling, as sorted items; () = none

    def inverse_frequencies(self) -> Tensor:
        """``[dim / 2]`` fp32: radians per position of each pair of channels.

        Raises:
            ConfigError: a scaling other than none, "linear" or "llama3".
        """
        channels = torch.arange(0, self.dim, 2, dtype=torch.float32)
        frequencies = 1.0 / (self.theta ** (channels / self.dim))
        scaling = dict(self.scaling)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return frequencies
        if kind == "linear":
            return frequencies / _number(scaling, "factor")
        if kind == "llama3":
            return _llama3(frequencies, scaling)
        raise ConfigError(f"rope_scaling type {kind!r} is not supported; supported: default, linear, llama3")


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
