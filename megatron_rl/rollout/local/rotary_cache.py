"""Rotary position tables of the local engine.

Heads are in the half-split form of Hugging Face and SGLang: dimension i turns with dimension i + head_dim / 2.
"""

from __future__ import annotations

import torch

from megatron_rl.models.components.position import Rotary


class RotaryCache:
    """Cosines and signed sines by position, grown to the longest position asked for."""

    def __init__(self, rotary: Rotary, dtype: torch.dtype, device: torch.device) -> None:
        self._inverse = rotary.inverse_frequencies()
        self._dtype, self._device = dtype, device
        self._cos = torch.empty(0, 1, rotary.dim, dtype=dtype, device=device)
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
