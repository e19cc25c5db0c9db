"""LoRA's update of a weight, merged: of a model in training when it is published, of a checkpoint when it is read."""

from __future__ import annotations

import torch
from torch import Tensor

SUFFIX = "_adapter"  # in checkpoints an adapter stands beside its layer: linear_qkv, linear_qkv_adapter


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``weight + scale * b @ a`` in fp32 (or wider), rounded once to the dtype of ``weight``, which is not changed."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)
