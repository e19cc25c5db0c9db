"""`HybridProcessGroup`: `HybridAllReduce` as a process group of torch.distributed.

Megatron-Core's DDP buckets and distributed optimizer reduce over whatever group they hold; given one of these, they use
the hybrid paths with no line of theirs changed (`gradient_groups.py` hands it to them). Sums and averages of fp32 and
bf16 tensors, all-gathers, coalesced or not, take the hybrid paths; every other collective is the library's.
"""

# mypy: disable-error-code="override, attr-defined, call-arg, assignment"
# torch's stubs lack what its dispatcher calls, and declare overloads of which it calls the one with options.
from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from megatron_rl.collectives.hybrid import HybridAllReduce, reducible
from megatron_rl.collectives.pending import Pending
from megatron_rl.collectives.policy import CollectivesConfig

BACKEND = "megatron_rl_hybrid"
SUMS = (dist.ReduceOp.SUM, dist.ReduceOp.AVG)


class HybridProcessGroup(dist.ProcessGroup):
    """Collectives of ``library``'s ranks.

    Args:
        library: gloo's or NCCL's process group of the same ranks.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, library: dist.ProcessGroup, config: CollectivesConfig
    ) -> None:
        super().__init__(rank, size)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.hybrid = HybridAllReduce(dist.PrefixStore("hybrid", store), library, config, device)
        self.library = library

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        return BACKEND

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        opts = opts or dist.AllreduceOptions()
        if opts.reduceOp not in SUMS or not all(reducible(tensor) for tensor in tensors):
            return self.hybrid.with_library(lambda: self.library.allreduce(tensors, opts))
        average = opts.reduceOp == dist.ReduceOp.AVG
        return _joined([self.hybrid.all_reduce(tensor, average) for tensor in tensors], tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        plain = dist.AllreduceOptions()
        if opts is not None:
            plain.reduceOp = opts.reduceOp
        works = [self.allreduce([tensor], plain) for tensor in tensors]
        return _joined(works, tensors)

    def reduce_scatter_single(self, out: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        opts = opts or dist.ReduceScatterOptions()
        if opts.reduceOp not in SUMS or not (reducible(tensor) and reducible(out)):
            return self.hybrid.with_library(lambda: self.library._reduce_scatter_base(out, tensor, opts))
        average = opts.reduceOp == dist.ReduceOp.AVG
        return self.hybrid.reduce_scatter(out, tensor, average)

    def reduce_scatter_single_coalesced(self, outs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        works = [self.reduce_scatter_single(out, tensor, opts) for out, tensor in zip(outs, tensors, strict=True)]
        return _joined(works, outs)

    def all_gather_single(self, out: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        if not (tensor.is_contiguous() and out.is_contiguous() and tensor.numel()):
            opts = opts or AllgatherOptions()
            return self.hybrid.with_library(lambda: self.library._allgather_base(out, tensor, opts))
        return self.hybrid.all_gather(out, tensor)

    def all_gather_single_coalesced(self, outs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        works = [self.all_gather_single(out, tensor, opts) for out, tensor in zip(outs, tensors, strict=True)]
        return _joined(works, outs)

    # torch's names before 2.13
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self.hybrid.with_library(lambda: self.library.broadcast(tensors, opts or dist.BroadcastOptions()))

    def allgather(self, outs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self.hybrid.with_library(lambda: self.library.allgather(outs, tensors, opts or AllgatherOptions()))

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        return self.hybrid.with_library(lambda: self.library.reduce(tensors, opts))

    def gather(self, outs: list[list[Tensor]], tensors: list[Tensor], opts: Any) -> dist.Work:
        return self.hybrid.with_library(lambda: self.library.gather(outs, tensors, opts))

    def scatter(self, outs: list[Tensor], tensors: list[list[Tensor]], opts: Any) -> dist.Work:
        return self.hybrid.with_library(lambda: self.library.scatter(outs, tensors, opts))

    def alltoall_base(
        self, out: Tensor, tensor: Tensor, out_sizes: list[int], sizes: list[int], opts: Any
    ) -> dist.Work:
        return self.hybrid.with_library(lambda: self.library.alltoall_base(out, tensor, out_sizes, sizes, opts))

    def barrier(self, opts: Any = None) -> dist.Work:
        return self.hybrid.with_library(lambda: self.library.barrier(opts or dist.BarrierOptions()))


def _joined(works: list[dist.Work], tensors: list[Tensor]) -> dist.Work:
    return works[0] if len(works) == 1 else Pending(works, tensors)


def register_backend(config: CollectivesConfig) -> str:
    """Make ``dist.new_group(backend=...)`` know the hybrid group of this configuration; returns the backend's name."""
    name = f"{BACKEND}_{abs(hash(config)) % 16**8:08x}"
    if name not in dist.Backend.backend_list:
        dist.Backend.register_backend(name, functools.partial(_create, config), devices=["cpu", "cuda"])
    return name


def _create(
    config: CollectivesConfig, store: dist.Store, rank: int, size: int, timeout: timedelta
) -> HybridProcessGroup:
    inner = dist.PrefixStore("library", store)
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        library: Any = dist.ProcessGroupNCCL(inner, rank, size, options)
    else:
        library = dist.ProcessGroupGloo(inner, rank, size, timeout)
    return HybridProcessGroup(store, rank, size, library, config)
