"""Rotary position tables of the local engine.

Heads are in the half-split form of Hugging Face and SGLang: channel i turns with channel i + dim / 2.
"""

from __future__ import annotations

import torch

from megatron_rl.models.components.position import Rotary


class RotaryCache:
    """Cosines and signed sines by position, grown to the longest position asked for."""

    def __init__(self, rotary: Rotary, dtype: torch.dtype, device: torch.device) -> None:
        self._rotary = rotary
        self._dtype, self._device = dtype, device
        self._cos = torch.empty(0, 1, rotary.dim, dtype=dtype, device=device)
        self._sin, self._length = self._cos, 0

    def reserve(self, length: int) -> None:
        """Make positions ``[0, length)`` available."""
        if length <= self._length:
            return
        self._length, switch = length, self._rotary.switch
        lengths = (1,) if switch is None else (1, switch + 1)  # one table behind the other
        cos, sin = torch.cat([self._rotary.cos_sin(torch.arange(length), some) for some in lengths], 1)
        self._cos = torch.cat([cos, cos], -1)[:, None].to(self._device, self._dtype)
        self._sin = torch.cat([-sin, sin], -1)[:, None].to(self._device, self._dtype)

    def rows(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines ``[tokens, 1, dim]`` of ``positions`` ``[tokens]`` in sequences of ``lengths``
        ``[tokens]``.

        A sequence that grows beyond LongRoPE's switch keeps the keys that it has, as in transformers and SGLang."""
        if self._rotary.switch is not None:
            positions = torch.where(lengths > self._rotary.switch, positions + self._length, positions)
        return self._cos[positions], self._sin[positions]


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn the first ``dim`` channels of ``heads`` ``[tokens, heads, head_dim]`` in place. The sines carry the sign of
    the first half, so that the half turn is one roll."""
    heads = heads[..., : cos.shape[-1]]
    turned = heads.roll(heads.shape[-1] // 2, -1)
    torch.addcmul(heads * cos, turned, sin, out=heads)
