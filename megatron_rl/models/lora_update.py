"""What LoRA computes whatever trains: A's first values, and the update merged into a weight, of a model in training
when it is published, of a checkpoint when it is read."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

SUFFIX = "_adapter"  # in checkpoints an adapter stands beside its layer: linear_qkv, linear_qkv_adapter


def first_values(layer: str, rank: int, inputs: int, seed: int) -> Tensor:
    """A of a whole layer, ``[rank, inputs]`` fp32: uniform within 1 / sqrt(inputs), which is Kaiming with a = sqrt(5),
    as in PEFT. It depends on the layer's name, and so on no layout."""
    digest = hashlib.blake2b(f"{seed} {layer}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    bound = 1 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """``weight + b @ diag(scale) @ a`` in fp32 (or wider), rounded once to the dtype of ``weight``, which is not
    changed.

    Args:
        scale: alpha / rank, or ``[rank]`` where it differs.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    b = b.to(wide)
    if isinstance(scale, Tensor):
        b, scale = b * scale, 1.0
    return torch.addmm(weight.to(wide), b, a.to(wide), alpha=scale).to(weight.dtype)
