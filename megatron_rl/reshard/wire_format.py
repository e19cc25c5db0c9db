"""`WireFormat`: the dtype in which each logical tensor travels, or is held. Both ends must use the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class WireFormat:
    """``dtype`` for all tensors except those named in ``exceptions`` (say a router bias that must stay float32)."""

    dtype: torch.dtype = torch.bfloat16
    exceptions: Mapping[str, torch.dtype] = field(default_factory=dict)

    def of(self, tensor: str) -> torch.dtype:
        return self.exceptions.get(tensor, self.dtype)

    @property
    def widest(self) -> int:
        """Bytes of the widest element that may travel."""
        return max(dtype.itemsize for dtype in (self.dtype, *self.exceptions.values()))
