"""`LibraryPath`: the collectives of gloo or NCCL as they are."""

# mypy: disable-error-code="attr-defined, assignment"
# torch's stubs lack these methods and options.
from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class LibraryPath:
    """Blocking calls; on CUDA only the current stream waits.

    Args:
        group: gloo's or NCCL's process group.
        timeout: seconds that a call may take on CPU; NCCL has its own limit.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        self._group, self._device, self._limit = group, device, timedelta(seconds=timeout)

    def all_reduce(self, tensor: Tensor) -> None:
        self.finish(self._group.allreduce([tensor], dist.AllreduceOptions()))

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        self.finish(self._group._reduce_scatter_base(out, tensor, dist.ReduceScatterOptions()))

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        if self._device.type == "cpu":  # gloo has no gather into one tensor
            rows = list(out.view(self._group.size(), -1).unbind())
            self.finish(self._group.allgather([rows], [tensor]))
        else:
            self.finish(self._group._allgather_base(out, tensor, dist.AllgatherOptions()))

    def agree(self, figures: Tensor) -> None:
        """Broadcast rank 0's ``figures``, a CPU tensor, to all ranks, in place."""
        on_device = figures.to(self._device)
        self.finish(self._group.broadcast([on_device], dist.BroadcastOptions()))
        figures.copy_(on_device)

    def finish(self, work: dist.Work) -> None:
        """Wait for a collective of the library."""
        if self._device.type == "cpu":
            work.wait(self._limit)
        else:
            work.wait()
