"""`add_rms_norm` in torch, on any device and dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `megatron_rl.ops.add_rms_norm.interface.add_rms_norm`."""
    hidden += delta
    return F.rms_norm(hidden, hidden.shape[-1:], weight, eps)
