"""`Staging`: between a rank's tensors and node memory; where sums are taken.

On CUDA node memory is pinned, so copies run on the current stream beside what the processor does, and sums are taken by
the device: parts go up, the sum comes back, and the processor's cores are left alone. `finish` waits for the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.collectives.node_memory import NodeMemory
from megatron_rl.ops.accumulate import accumulate
from megatron_rl.ops.selection import choose


class Staging:
    """Args:
    device: of the tensors that are reduced.
    memory: of the node; every rank pins its own mapping of it.
    """

    def __init__(self, device: torch.device, memory: NodeMemory) -> None:
        self._device, self._on_cuda = device, device.type == "cuda"
        self._pinned = memory.everything
        self._accumulate = choose("accumulate", "cpu")
        if self._on_cuda:
            _check(torch.cuda.cudart().cudaHostRegister(self._pinned.data_ptr(), self._pinned.numel(), 0))

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Begin a copy; on CPU it is done at once."""
        to.copy_(source, non_blocking=True)

    def sum(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """``out`` = the parts' sum in fp32, in their order, rounded once to its dtype; all in host memory."""
        if not self._on_cuda:
            if out.numel():
                self._accumulate(parts, out)  # not through the interface, whose checks cost more than a small sum
            return
        total = torch.empty(out.shape, dtype=out.dtype, device=self._device)
        out.copy_(accumulate([part.to(self._device, non_blocking=True) for part in parts], total))

    def finish(self) -> None:
        """Wait for the copies."""
        if self._on_cuda:
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Unpin."""
        if self._on_cuda:
            _check(torch.cuda.cudart().cudaHostUnregister(self._pinned.data_ptr()))


def _check(error: object) -> None:
    if int(error) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"node memory cannot be pinned: CUDA error {error}")
