"""`Rotary`: rotary positions, with the frequency scalings that Hugging Face configs name.

Formulas follow transformers' ``modeling_rope_utils``: Llama 3's, YaRN (Peng et al. 2023, arXiv:2309.00071) and LongRoPE
(Ding et al. 2024, arXiv:2402.13753).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.config import ConfigError

Scaling = tuple[tuple[str, object], ...]  # items of Hugging Face's rope_parameters, sorted, lists as tuples


@dataclass(frozen=True, slots=True)
class Rotary:
    """Channel i of a head turns with channel i + dim / 2 (the half-split form of Hugging Face); channels from ``dim``
    on, where a head has more, are left as they are."""

    dim: int
    theta: float
    scaling: Scaling = ()  # () = none
    max_positions: int = 0  # of the config; gives the stretching of YaRN and LongRoPE where they name none

    @property
    def kind(self) -> str:
        """Hugging Face's ``rope_type``."""
        scaling = dict(self.scaling)
        return str(scaling.get("rope_type", scaling.get("type", "default")))

    @property
    def switch(self) -> int | None:
        """The length above which a sequence turns by other frequencies (LongRoPE); None = all turn alike."""
        return int(_number(dict(self.scaling), "original_max_position_embeddings")) if self.kind == "longrope" else None

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by (Hugging Face's ``attention_factor``)."""
        scaling = dict(self.scaling)
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if scaling.get("attention_factor") is not None:
            return _number(scaling, "attention_factor")
        factor = self._stretch(scaling)
        if self.kind == "longrope":
            original = _number(scaling, "original_max_position_embeddings")
            return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            return yarn_mscale(factor, _number(scaling, "mscale")) / yarn_mscale(
                factor, _number(scaling, "mscale_all_dim")
            )
        return yarn_mscale(factor)

    def inverse_frequencies(self, length: int = 1) -> Tensor:
        """``[dim / 2]`` fp32: radians per position of each pair of channels, in a sequence of ``length`` tokens.

        Raises:
            ConfigError: a scaling that is not in `SCALINGS`, or without a number that it needs.
        """
        channels = torch.arange(0, self.dim, 2, dtype=torch.float32)
        wavelengths = self.theta ** (channels / self.dim)
        if self.kind not in SCALINGS:
            raise ConfigError(f"rope_scaling type {self.kind!r} is not supported; supported: {', '.join(SCALINGS)}")
        return SCALINGS[self.kind](self, wavelengths, dict(self.scaling), length)

    def cos_sin(self, positions: Tensor, length: int = 1) -> Tensor:
        """``[2, positions, dim / 2]`` fp32: cosines and sines at ``positions`` of a sequence of ``length`` tokens."""
        angles = torch.outer(positions.float(), self.inverse_frequencies(length).to(positions.device))
        return torch.stack([angles.cos(), angles.sin()]) * self.amplitude

    def _stretch(self, scaling: Mapping[str, object]) -> float:
        """By how much positions are stretched: ``factor``, or what the context grew by."""
        if scaling.get("factor") is not None:
            return _number(scaling, "factor")
        return self.max_positions / _number(scaling, "original_max_position_embeddings")


def neighbours_to_halves(x: Tensor) -> Tensor:
    """Channels that turn together: from neighbours, as DeepSeek's files have them, to one in each half of a head."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def yarn_mscale(stretch: float, weight: float = 1.0) -> float:
    """YaRN's correction of attention scores (equation 22 of the paper, ``weight`` as DeepSeek has it)."""
    return 1.0 if stretch <= 1.0 else 0.1 * weight * math.log(stretch) + 1.0


def _plain(rotary: Rotary, wavelengths: Tensor, scaling: Mapping[str, object], length: int) -> Tensor:
    return 1.0 / wavelengths


def _linear(rotary: Rotary, wavelengths: Tensor, scaling: Mapping[str, object], length: int) -> Tensor:
    return 1.0 / wavelengths / _number(scaling, "factor")


def _llama3(rotary: Rotary, wavelengths: Tensor, scaling: Mapping[str, object], length: int) -> Tensor:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    frequencies = 1.0 / wavelengths
    factor, low, high = (_number(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _number(scaling, "original_max_position_embeddings")
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(is_between, between, stretched)


def _yarn(rotary: Rotary, wavelengths: Tensor, scaling: Mapping[str, object], length: int) -> Tensor:
    """Channels that turn often within the original context are kept, those that turn seldom stretched, with a ramp
    between."""
    original = _number(scaling, "original_max_position_embeddings")

    def channel(turns: float) -> float:
        """The pair that makes so many ``turns`` in the original context."""
        return rotary.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = (channel(_number(scaling, name, default)) for name, default in (("beta_fast", 32), ("beta_slow", 1)))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    pairs = torch.arange(rotary.dim // 2, dtype=torch.float32)
    kept = 1 - torch.clamp((pairs - low) / (high - low if high != low else 0.001), 0, 1)
    return (1 - kept) / (rotary._stretch(scaling) * wavelengths) + kept / wavelengths


def _longrope(rotary: Rotary, wavelengths: Tensor, scaling: Mapping[str, object], length: int) -> Tensor:
    """Every pair is stretched by a number of its own; there is one list for sequences within the original context, and
    one for longer ones."""
    name = "long_factor" if length > _number(scaling, "original_max_position_embeddings") else "short_factor"
    factors = scaling.get(name)
    if not isinstance(factors, tuple | list) or len(factors) != rotary.dim // 2:
        raise ConfigError(f"rope_scaling needs {rotary.dim // 2} numbers in {name!r}, got {factors!r:.200}")
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * wavelengths)


SCALINGS: dict[str, Callable[[Rotary, Tensor, Mapping[str, object], int], Tensor]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _number(scaling: Mapping[str, object], name: str, default: float | None = None) -> float:
    value = scaling.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float):
        raise ConfigError(f"rope_scaling needs a number {name!r}, got {value!r} among {sorted(scaling)}")
    return float(value)
