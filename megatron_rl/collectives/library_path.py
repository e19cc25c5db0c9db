"""`LibraryPath`: the collectives of gloo or NCCL as they are."""

# mypy: disable-error-code="attr-defined, assignment"
# torch's stubs lack these methods and options.
from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from megatron_rl.collectives.pending import Pending


class LibraryPath:
    """Calls that return the library's own works.

    Args:
        group: gloo's or NCCL's process group.
        timeout: seconds that a call may take on CPU; NCCL has its own limit.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        self._group, self._device, self._limit = group, device, timedelta(seconds=timeout)

    def all_reduce(self, tensor: Tensor, average: bool = False) -> dist.Work:
        work = self._group.allreduce([tensor], self._options(dist.AllreduceOptions(), average))
        return self._averaged(work, tensor, average)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, average: bool = False) -> dist.Work:
        work = self._group._reduce_scatter_base(out, tensor, self._options(dist.ReduceScatterOptions(), average))
        return self._averaged(work, out, average)

    def all_gather(self, out: Tensor, tensor: Tensor, average: bool = False) -> dist.Work:
        if self._device.type == "cpu":  # gloo has no gather into one tensor
            options = AllgatherOptions()
            options.timeout = self._limit
            return self._group.allgather([list(out.view(self._group.size(), -1).unbind())], [tensor], options)
        return self._group._allgather_base(out, tensor, AllgatherOptions())

    def agree(self, figures: Tensor) -> None:
        """Broadcast rank 0's ``figures``, a CPU tensor, to all ranks, in place."""
        on_device = figures.to(self._device)
        self._group.broadcast([on_device], dist.BroadcastOptions()).wait()
        figures.copy_(on_device)

    def largest(self, figures: Tensor) -> None:
        """The largest of all ranks' ``figures``, a CPU tensor, on all ranks, in place; none returns before all came."""
        on_device, options = figures.to(self._device), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        self._group.allreduce([on_device], options).wait()
        figures.copy_(on_device)

    def _options(self, options: Any, average: bool) -> Any:
        if self._device.type == "cpu":
            options.timeout = self._limit
        elif average:
            options.reduceOp = dist.ReduceOp.AVG
        return options

    def _averaged(self, work: dist.Work, tensor: Tensor, average: bool) -> dist.Work:
        """gloo has sums only: the caller that waits divides."""
        if not average or self._device.type != "cpu":
            return work
        return Pending([work], [tensor], lambda: tensor.div_(self._group.size()))
