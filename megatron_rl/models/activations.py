"""The activations of gated feed-forward layers, by Hugging Face's names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GATE_SLOPE = 1.702  # of the sigmoid in gpt-oss's gates


def gelu_pytorch_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_pytorch_tanh,
}


def clamped_gate(gates_and_ups: Tensor, limit: float) -> Tensor:
    """gpt-oss's activation (transformers ``GptOssExperts._apply_gate``): ``[.., 2 * ffn]``, gates and ups in turn ->
    ``[.., ffn]``."""
    gate = gates_and_ups[..., ::2].clamp(max=limit)
    up = gates_and_ups[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(gate * GATE_SLOPE)
