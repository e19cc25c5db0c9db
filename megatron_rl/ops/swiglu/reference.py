"""`swiglu` in torch, on any device and dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """See `megatron_rl.ops.swiglu.interface.swiglu`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
