"""`HybridProcessGroup`: `HybridAllReduce` as a process group of torch.distributed.

Megatron-Core's DDP buckets and distributed optimizer reduce over whatever group they hold; given one of these, they use
the hybrid paths with no line of theirs changed (`gradient_groups.py` hands it to them). Sums and averages of fp32 and
bf16 tensors, all-gathers, coalesced or not, take the hybrid paths; every other collective is the library's.
"""

# mypy: disable-error-code="override, attr-defined, call-arg, assignment"
# torch's stubs lack what its dispatcher calls, and declare overloads of which it calls the one with options.
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives.hybrid import HybridAllReduce, reducible
from megatron_rl.collectives.policy import CollectivesConfig

BACKEND = "megatron_rl_hybrid"
SUMS = (dist.ReduceOp.SUM, dist.ReduceOp.AVG)


class _Pending(dist._Work):
    """The handle of an asynchronous call."""

    def __init__(self, futures: Sequence[Future[None]], result: list[Tensor]) -> None:
        super().__init__()
        self._futures, self._result = futures, result

    def wait(self, timeout: timedelta | None = None) -> bool:
        for future in self._futures:
            future.result(timeout.total_seconds() if timeout else None)
        return True

    def is_completed(self) -> bool:
        return all(future.done() for future in self._futures)

    def is_success(self) -> bool:
        return self.is_completed() and all(future.exception() is None for future in self._futures)

    def result(self) -> list[Tensor]:
        return self._result

    def get_future(self) -> torch.futures.Future:
        done: torch.futures.Future = torch.futures.Future()
        self.wait()
        done.set_result(self._result)
        return done


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
            return self._other(lambda: self.library.allreduce(tensors, opts), tensors)
        average = opts.reduceOp == dist.ReduceOp.AVG
        return _Pending([self.hybrid.all_reduce(tensor, average) for tensor in tensors], tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        plain = dist.AllreduceOptions()
        if opts is not None:
            plain.reduceOp = opts.reduceOp
        works = [self.allreduce([tensor], plain) for tensor in tensors]
        return _Pending([future for work in works for future in work._futures], tensors)

    def reduce_scatter_single(self, out: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        opts = opts or dist.ReduceScatterOptions()
        if opts.reduceOp not in SUMS or not (reducible(tensor) and reducible(out)):
            return self._other(lambda: self.library._reduce_scatter_base(out, tensor, opts), [out])
        average = opts.reduceOp == dist.ReduceOp.AVG
        return _Pending([self.hybrid.reduce_scatter(out, tensor, average)], [out])

    def reduce_scatter_single_coalesced(self, outs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        works = [self.reduce_scatter_single(out, tensor, opts) for out, tensor in zip(outs, tensors, strict=True)]
        return _Pending([future for work in works for future in work._futures], outs)

    def all_gather_single(self, out: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        if not (tensor.is_contiguous() and out.is_contiguous() and tensor.numel()):
            opts = opts or dist.AllgatherOptions()
            return self._other(lambda: self.library._allgather_base(out, tensor, opts), [out])
        return _Pending([self.hybrid.all_gather(out, tensor)], [out])

    def all_gather_single_coalesced(self, outs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        works = [self.all_gather_single(out, tensor, opts) for out, tensor in zip(outs, tensors, strict=True)]
        return _Pending([future for work in works for future in work._futures], outs)

    # torch's names before 2.13
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._other(lambda: self.library.broadcast(tensors, opts or dist.BroadcastOptions()), tensors)

    def allgather(self, outs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._other(lambda: self.library.allgather(outs, tensors, opts or dist.AllgatherOptions()), tensors)

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        return self._other(lambda: self.library.reduce(tensors, opts), tensors)

    def gather(self, outs: list[list[Tensor]], tensors: list[Tensor], opts: Any) -> dist.Work:
        return self._other(lambda: self.library.gather(outs, tensors, opts), tensors)

    def scatter(self, outs: list[Tensor], tensors: list[list[Tensor]], opts: Any) -> dist.Work:
        return self._other(lambda: self.library.scatter(outs, tensors, opts), outs)

    def alltoall_base(
        self, out: Tensor, tensor: Tensor, out_sizes: list[int], sizes: list[int], opts: Any
    ) -> dist.Work:
        return self._other(lambda: self.library.alltoall_base(out, tensor, out_sizes, sizes, opts), [out])

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._other(lambda: self.library.barrier(opts or dist.BarrierOptions()), [])

    def _other(self, begin: Callable[[], dist.Work], result: list[Tensor]) -> dist.Work:
        return _Pending([self.hybrid.with_library(begin)], result)


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
