"""`StagingPool`: the only extra memory of a reshard, equal buffers under a fixed total."""

from __future__ import annotations

import torch
from torch import Tensor


class StagingPool:
    """Up to ``max_bytes // buffer_bytes`` buffers, allocated as they are first needed and reused.

    Args:
        buffer_bytes: size of each; a multiple of 8, so that any dtype may view it.
    """

    def __init__(self, buffer_bytes: int, max_bytes: int, device: torch.device) -> None:
        self._buffer_bytes, self._device = buffer_bytes, device
        self._left = max_bytes // buffer_bytes if buffer_bytes else 0
        self._free: list[Tensor] = []
        self.allocated_bytes = 0

    def available(self, count: int) -> bool:
        """Whether ``count`` buffers can be taken now."""
        return len(self._free) + self._left >= count

    def take(self) -> Tensor:
        """A flat byte tensor; give it back with `give`."""
        if self._free:
            return self._free.pop()
        assert self._left > 0, "take() without available()"
        self._left -= 1
        self.allocated_bytes += self._buffer_bytes
        return torch.empty(self._buffer_bytes, dtype=torch.uint8, device=self._device)

    def give(self, buffer: Tensor) -> None:
        self._free.append(buffer)
