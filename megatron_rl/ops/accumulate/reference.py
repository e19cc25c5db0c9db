"""`accumulate` in torch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def accumulate(parts: Sequence[Tensor], out: Tensor) -> None:
    """See `megatron_rl.ops.accumulate.interface.accumulate`."""
    total = parts[0].float().flatten()
    for part in parts[1:]:
        total = total + part.flatten()
    out.view(-1).copy_(total)
