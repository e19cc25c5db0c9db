"""Rotary position tables, with Hugging Face's "linear" and "llama3" frequency scaling.

Heads are in the half-split form of Hugging Face and SGLang: dimension i turns with dimension i + head_dim / 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_rl.models import Architecture


def inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """Radians per position of each rotated pair, ``[head_dim / 2]`` fp32.

    Source: transformers `modeling_rope_utils` (`_compute_default_rope_parameters`, `_compute_llama3_parameters`).

    Raises:
        ValueError: the scaling type is unknown here.
    """
    dims = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32)
    inverse = 1.0 / architecture.rope_theta ** (dims / architecture.head_dim)
    scaling: dict[str, Any] = dict(architecture.rope_scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return inverse
    if kind == "linear":
        return inverse / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(inverse, scaling)
    raise ValueError(
        f"rope_scaling type {kind!r} is not known to the local engine: it knows default, linear and llama3"
    )


def _llama3(inverse: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * inverse / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return inverse * (smooth + (1 - smooth) / float(scaling["factor"]))


class RotaryTable:
    """Cosines and signed sines by position, grown to the longest position asked for."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self._inverse = inverse_frequencies(architecture)
        self._dtype, self._device = dtype, device
        self._cos = torch.empty(0, 1, architecture.head_dim, dtype=dtype, device=device)
        self._sin = self._cos

    def reserve(self, length: int) -> None:
        """Make positions ``[0, length)`` available."""
        if length <= len(self._cos):
            return
        angles = torch.arange(length, dtype=torch.float32)[:, None] * self._inverse
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat([cos, cos], -1)[:, None].to(self._device, self._dtype)
        self._sin = torch.cat([-sin, sin], -1)[:, None].to(self._device, self._dtype)

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines ``[tokens, 1, head_dim]`` of ``positions`` ``[tokens]``."""
        return self._cos[positions], self._sin[positions]


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn ``heads`` ``[tokens, heads, head_dim]`` in place. The sines carry the sign of the first half, so that the
    half turn is one roll."""
    turned = heads.roll(heads.shape[-1] // 2, -1)
    torch.addcmul(heads * cos, turned, sin, out=heads)
