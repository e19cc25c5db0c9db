"""`HybridAllReduce`: reductions of one group, each by the fastest path: the library's, or through node memory.

One thread begins all the work, in the order of the calls, which is the same on all ranks: an asynchronous call returns
at once, and ranks never meet in different operations. CUDA tensors are copied to and from host memory on a stream of
the thread's own; the caller's stream waits for it as it does for NCCL's.
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
from megatron_rl.collectives.library_path import LibraryPath
from megatron_rl.collectives.link_weights import weigh_links
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.pipelines import Pipelines
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
        self._pipelines = Pipelines(store, self.rank, self.nodes, config, device)
        self._order = StreamOrder(device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collectives")
        self._selectors: dict[str, Selector] = {}
        self._calibrations = Calibrations(self._topology()) if config.reuse_calibration else None
        self._weighed = len(config.links) < 2 or self.nodes.num_nodes == 1

    def all_reduce(self, tensor: Tensor, average: bool = False) -> Future[None]:
        """Begin a sum (or average) over the ranks, in place. ``tensor``: contiguous, fp32 or bf16."""
        flat = tensor.detach().view(-1)
        return self._submit("all_reduce", (flat,), flat, flat if average else None)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, average: bool = False) -> Future[None]:
        """Begin ``out`` = this rank's part of the sum (or average). ``tensor``: ``size`` parts as long as ``out``."""
        whole, part = tensor.detach().view(-1), out.detach().view(-1)
        return self._submit("reduce_scatter", (part, whole), whole, part if average else None)

    def all_gather(self, out: Tensor, tensor: Tensor) -> Future[None]:
        """Begin ``out`` = all ranks' ``tensor``, in rank order; contiguous, any dtype."""
        whole, part = out.detach().view(-1), tensor.detach().view(-1)
        return self._submit("all_gather", (whole, part), whole, None)

    def with_library(self, begin: Callable[[], dist.Work]) -> Future[None]:
        """Begin any other collective of the library, in turn with those above."""
        return self._thread.submit(self._order.inside(self._order.mark(), lambda: self._library.finish(begin())))

    def selectors(self) -> Mapping[str, Selector]:
        """The calibrated selector of each kind of collective used so far."""
        return self._selectors

    def close(self) -> None:
        """Wait for what was begun, and end the threads."""
        self._thread.shutdown(wait=True)
        self._pipelines.close()

    def _topology(self) -> str:
        """All that the costs of the paths depend on, as rank 0 sees it."""
        config = self.config
        links = " and ".join(config.links) or "the default interface"
        return (
            f"{self.nodes} ({', '.join(self.nodes.hosts)}), {self.device.type}, over {links}, "
            f"wire {config.wire_dtype}, chunks of {config.chunk_mb:g} MB, torch {torch.__version__}"
        )

    # On the thread

    def _submit(self, kind: str, tensors: tuple[Tensor, ...], moved: Tensor, averaged: Tensor | None) -> Future[None]:
        def work() -> None:
            num_bytes = moved.numel() * moved.element_size()
            selector = self._selector(kind)
            choice = selector.choose(num_bytes)
            started = time.perf_counter()
            self._run(choice.path, kind, tensors)
            if averaged is not None:
                averaged.div_(self.size)
            selector.measured(choice, num_bytes, time.perf_counter() - started)

        return self._thread.submit(self._order.inside(self._order.mark(), work))

    def _run(self, path: str, kind: str, tensors: tuple[Tensor, ...]) -> None:
        chosen = self._pipelines if path == HIERARCHICAL else self._library
        collectives: dict[str, Callable[..., None]] = {
            "all_reduce": chosen.all_reduce,
            "reduce_scatter": chosen.reduce_scatter,
            "all_gather": chosen.all_gather,
        }
        collectives[kind](*tensors)

    def _selector(self, kind: str) -> Selector:
        if not self._weighed:
            self._weighed = True
            weigh_links(self._pipelines, self._library.agree)
        if kind not in self._selectors:
            probes = {path: functools.partial(self._probe, kind, path) for path in (LIBRARY, HIERARCHICAL)}
            self._selectors[kind] = Selector(
                kind,
                probes,
                self._library.agree,
                minimum_gain=self.config.minimum_gain,
                deterministic=self.config.deterministic,
                talks=self.rank == 0,
                calibrations=self._calibrations,
            )
        return self._selectors[kind]

    def _probe(self, kind: str, path: str, num_bytes: int) -> None:
        """Move so many bytes of zeros by one path."""
        part = torch.zeros(max(1, num_bytes // 4 // self.size), device=self.device)
        whole = torch.zeros(part.numel() * self.size, device=self.device)
        tensors = {"all_reduce": (whole,), "reduce_scatter": (part, whole), "all_gather": (whole, part)}[kind]
        self._run(path, kind, tensors)
        self._order.finish()


def reducible(tensor: Tensor) -> bool:
    """Whether `HybridAllReduce` takes it; anything else goes to the library."""
    return tensor.dtype in DTYPES and tensor.is_contiguous() and tensor.numel() > 0
