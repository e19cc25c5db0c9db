"""`HybridAllReduce`: reductions of one group, each by the fastest path: the library's, or through node memory.

A message that the library takes is the library's call and nothing else. One thread carries out all the others, and what
is called while it is busy, in the order of the calls, which is the same on all ranks: an asynchronous call returns at
once, and ranks never meet in different operations. CUDA tensors are copied to and from host memory on a stream of the
thread's own, which waits for what the caller's stream had queued.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives.calibrations import Calibrations
from megatron_rl.collectives.cost_model import HIERARCHICAL, LIBRARY
from megatron_rl.collectives.hierarchical import HierarchicalPath
from megatron_rl.collectives.library_path import LibraryPath
from megatron_rl.collectives.link_weights import weigh_links
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.pending import Pending
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
        self.config, self.device = config, device
        self.rank, self.size = library.rank(), library.size()
        self.nodes = nodes or NodeMap.discover(store, self.rank, self.size)
        self._library = LibraryPath(library, device, 4 * config.timeout_seconds)
        self._path = HierarchicalPath(store, self.rank, self.nodes, config, device)
        self._order = StreamOrder(device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collectives")
        self._last: Future[None] | None = None  # the latest task of the thread
        self._selectors: dict[str, Selector] = {}
        self._calibrations = Calibrations(self._topology()) if config.reuse_calibration else None
        self._weighed = len(config.links) < 2 or self.nodes.num_nodes == 1

    def all_reduce(self, tensor: Tensor, average: bool = False) -> dist.Work:
        """Begin a sum (or average) over the ranks, in place. ``tensor``: contiguous, fp32 or bf16."""
        flat = tensor.detach().view(-1)
        return self._begin("all_reduce", (flat,), flat, average)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, average: bool = False) -> dist.Work:
        """Begin ``out`` = this rank's part of the sum (or average). ``tensor``: ``size`` parts as long as ``out``."""
        whole, part = tensor.detach().view(-1), out.detach().view(-1)
        return self._begin("reduce_scatter", (part, whole), whole, average)

    def all_gather(self, out: Tensor, tensor: Tensor) -> dist.Work:
        """Begin ``out`` = all ranks' ``tensor``, in rank order; contiguous, any dtype."""
        whole, part = out.detach().view(-1), tensor.detach().view(-1)
        return self._begin("all_gather", (whole, part), whole, False)

    def with_library(self, begin: Callable[[], dist.Work]) -> dist.Work:
        """Begin any other collective of the library, in turn with those above."""
        return begin() if self._idle() else self._submit(lambda: begin().wait())

    def selectors(self) -> Mapping[str, Selector]:
        """The calibrated selector of each kind of collective used so far."""
        return self._selectors

    def close(self) -> None:
        """Wait for what was begun, and end the threads."""
        self._thread.shutdown(wait=True)
        self._path.close()

    def _topology(self) -> str:
        """All that the costs of the paths depend on, as rank 0 sees it."""
        config = self.config
        links = " and ".join(config.links) or "the default interface"
        return (
            f"{self.nodes} ({', '.join(self.nodes.hosts)}), {self.device.type}, over {links}, "
            f"wire {config.wire_dtype}, chunks of {config.chunk_mb:g} MB, torch {torch.__version__}"
        )

    def _begin(self, kind: str, tensors: tuple[Tensor, ...], moved: Tensor, average: bool) -> dist.Work:
        """The library's own work where it is chosen and nothing waits before it; else a task of the thread.

        Either way its calls have the same order on all ranks: a rank whose thread is busy queues what others begin.
        """
        num_bytes, selector = moved.numel() * moved.element_size(), self._selector(kind)
        number = selector.next_number(num_bytes)
        if self._idle() and selector.leaves_alone(number, num_bytes):
            return self._library_call(kind, tensors, average)

        def work() -> None:
            self._weigh()
            choice = selector.choose(number, num_bytes)
            started = time.perf_counter()
            self._run(choice.path, kind, tensors, average)
            selector.measured(number, choice, num_bytes, time.perf_counter() - started)

        return self._submit(work)

    def _idle(self) -> bool:
        return self._last is None or self._last.done()

    def _submit(self, work: Callable[[], object]) -> dist.Work:
        self._last = self._thread.submit(self._order.inside(self._order.mark(), work))
        return Pending([self._last])

    def _selector(self, kind: str) -> Selector:
        if kind not in self._selectors:
            probes = {path: functools.partial(self._probe, kind, path) for path in (LIBRARY, HIERARCHICAL)}
            self._selectors[kind] = Selector(
                kind,
                probes,
                self._library.agree,
                self._library.largest,
                minimum_gain=self.config.minimum_gain,
                deterministic=self.config.deterministic,
                talks=self.rank == 0,
                calibrations=self._calibrations,
            )
        return self._selectors[kind]

    def _library_call(self, kind: str, tensors: tuple[Tensor, ...], average: bool) -> dist.Work:
        calls: dict[str, Callable[..., dist.Work]] = {
            "all_reduce": self._library.all_reduce,
            "reduce_scatter": self._library.reduce_scatter,
            "all_gather": self._library.all_gather,
        }
        return calls[kind](*tensors, average)

    # On the thread

    def _run(self, path: str, kind: str, tensors: tuple[Tensor, ...], average: bool) -> None:
        if path != HIERARCHICAL:
            self._library_call(kind, tensors, average).wait()
            return
        keyed = {"key": (tensors[-1].data_ptr(), tensors[-1].numel())} if kind != "all_gather" else {}
        calls: dict[str, Callable[..., None]] = {
            "all_reduce": self._path.all_reduce,
            "reduce_scatter": self._path.reduce_scatter,
            "all_gather": self._path.all_gather,
        }
        calls[kind](*tensors, **keyed)
        if average:
            tensors[0].div_(self.size)

    def _weigh(self) -> None:
        if not self._weighed:
            self._weighed = True
            weigh_links(self._path, self._library.largest)

    def _probe(self, kind: str, path: str, num_bytes: int) -> Callable[[], None]:
        """What moves so many bytes of zeros by one path."""
        part = torch.zeros(max(1, num_bytes // 4 // self.size), device=self.device)
        whole = torch.zeros(part.numel() * self.size, device=self.device)
        tensors = {"all_reduce": (whole,), "reduce_scatter": (part, whole), "all_gather": (whole, part)}[kind]

        def run() -> None:
            self._run(path, kind, tensors, False)
            self._order.finish()

        return run


def reducible(tensor: Tensor) -> bool:
    """Whether `HybridAllReduce` takes it; anything else goes to the library."""
    return tensor.dtype in DTYPES and tensor.is_contiguous() and tensor.numel() > 0
