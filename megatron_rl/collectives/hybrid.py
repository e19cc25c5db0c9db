"""`HybridAllReduce`: reductions of one group, each by the fastest path: the library's, or through node memory.

One thread does all the work, in the order of the calls, which is the same on all ranks: an asynchronous call returns at
once, and ranks never meet in different operations. CUDA tensors are copied to and from host memory on a stream of the
thread's own; the caller's stream waits for it as it does for NCCL's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives.cost_model import HIERARCHICAL, LIBRARY
from megatron_rl.collectives.hierarchical import HierarchicalPath
from megatron_rl.collectives.link_weights import weigh_links
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.policy import CollectivesConfig
from megatron_rl.collectives.selector import Selector
from megatron_rl.collectives.stream_order import StreamOrder
from megatron_rl.ops.accumulate.interface import DTYPES


class HybridAllReduce:
    """One rank of a group; made collectively.

    Args:
        store: of this group alone (a prefix).
        library: the same ranks' process group of the library: gloo, or NCCL.
        nodes: where the ranks are; None finds out.
    """

    def __init__(
        self,
        store: dist.Store,
        library: dist.ProcessGroup,
        config: CollectivesConfig,
        device: torch.device,
        nodes: NodeMap | None = None,
    ) -> None:
        self.library, self.config, self.device = library, config, device
        self.rank, self.size = library.rank(), library.size()
        self.nodes = nodes or NodeMap.discover(store, self.rank, self.size)
        self.path = HierarchicalPath(store, self.rank, self.nodes, config)
        self._order = StreamOrder(device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collectives")
        self._selectors: dict[str, Selector] = {}
        self._weighed = len(config.links) < 2 or self.nodes.num_nodes == 1

    def all_reduce(self, tensor: Tensor, average: bool = False) -> Future[None]:
        """Begin a sum (or average) over the ranks, in place. ``tensor``: contiguous, fp32 or bf16."""
        flat = tensor.detach().view(-1)
        key = (flat.data_ptr(), flat.numel())

        def library() -> dist.Work:
            return self.library.allreduce([flat], dist.AllreduceOptions())

        def hierarchical() -> None:
            self.path.all_reduce(flat, key)

        return self._submit("all_reduce", flat, library, hierarchical, flat if average else None)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, average: bool = False) -> Future[None]:
        """Begin ``out`` = this rank's part of the sum (or average). ``tensor``: ``size`` parts of ``out``'s elements."""
        whole, part = tensor.detach().view(-1), out.detach().view(-1)

        def library() -> dist.Work:
            return self.library._reduce_scatter_base(part, whole, dist.ReduceScatterOptions())

        def hierarchical() -> None:
            self.path.reduce_scatter(part, whole, (whole.data_ptr(), whole.numel()))

        return self._submit("reduce_scatter", whole, library, hierarchical, part if average else None)

    def all_gather(self, out: Tensor, tensor: Tensor) -> Future[None]:
        """Begin ``out`` = all ranks' ``tensor``, in rank order."""
        whole, part = out.detach().view(-1), tensor.detach().view(-1)

        def library() -> dist.Work:
            return self._library_gather(whole, part)

        return self._submit("all_gather", whole, library, lambda: self.path.all_gather(whole, part), None)

    def with_library(self, begin: Callable[[], dist.Work]) -> Future[None]:
        """Begin any other collective of the library, in turn with those above."""
        return self._thread.submit(self._order.inside(self._order.mark(), lambda: self._finish(begin())))

    def costs(self) -> Mapping[str, Selector]:
        """The calibrated selector of each kind of collective used so far."""
        return self._selectors

    def close(self) -> None:
        """Wait for what was begun, and end the thread."""
        self._thread.shutdown(wait=True)

    # On the thread

    def _submit(
        self,
        kind: str,
        moved: Tensor,
        library: Callable[[], dist.Work],
        hierarchical: Callable[[], None],
        averaged: Tensor | None,
    ) -> Future[None]:
        def work() -> None:
            num_bytes = moved.numel() * moved.element_size()
            selector = self._selector(kind)
            choice = selector.choose(num_bytes)
            started = time.perf_counter()
            if choice.path == HIERARCHICAL:
                hierarchical()
            else:
                self._finish(library())
            if averaged is not None:
                averaged.div_(self.size)
            selector.measured(choice, num_bytes, time.perf_counter() - started)

        return self._thread.submit(self._order.inside(self._order.mark(), work))

    def _selector(self, kind: str) -> Selector:
        if not self._weighed:
            self._weighed = True
            weigh_links(self.path, self._agree)
        if kind not in self._selectors:
            self._selectors[kind] = Selector(
                kind,
                {LIBRARY: self._probe(kind, LIBRARY), HIERARCHICAL: self._probe(kind, HIERARCHICAL)},
                self._agree,
                minimum_gain=self.config.minimum_gain,
                deterministic=self.config.deterministic,
                talks=self.rank == 0,
            )
        return self._selectors[kind]

    def _probe(self, kind: str, path: str) -> Callable[[int], None]:
        """Moves so many bytes of zeros by one path."""

        def run(num_bytes: int) -> None:
            part = torch.zeros(max(1, num_bytes // 4 // self.size), device=self.device)
            whole = torch.zeros(part.numel() * self.size, device=self.device)
            if kind == "all_reduce":
                if path == HIERARCHICAL:
                    self.path.all_reduce(whole)
                else:
                    self._finish(self.library.allreduce([whole], dist.AllreduceOptions()))
            elif kind == "reduce_scatter":
                if path == HIERARCHICAL:
                    self.path.reduce_scatter(part, whole)
                else:
                    self._finish(self.library._reduce_scatter_base(part, whole, dist.ReduceScatterOptions()))
            elif path == HIERARCHICAL:
                self.path.all_gather(whole, part)
            else:
                self._finish(self._library_gather(whole, part))
            self._order.finish()

        return run

    def _library_gather(self, whole: Tensor, part: Tensor) -> dist.Work:
        if self.device.type == "cpu":  # gloo has no gather into one tensor
            return self.library.allgather([list(whole.view(self.size, -1).unbind())], [part])
        return self.library._allgather_base(whole, part, dist.AllgatherOptions())

    def _agree(self, figures: Tensor) -> None:
        on_device = figures.to(self.device)
        self._finish(self.library.broadcast([on_device], dist.BroadcastOptions()))
        figures.copy_(on_device)

    def _finish(self, work: dist.Work) -> None:
        if self.device.type == "cpu":
            work.wait(timedelta(seconds=4 * self.config.timeout_seconds))
        else:
            work.wait()


def reducible(tensor: Tensor) -> bool:
    """Whether `HybridAllReduce` takes it; anything else goes to the library."""
    return tensor.dtype in DTYPES and tensor.is_contiguous() and tensor.numel() > 0
