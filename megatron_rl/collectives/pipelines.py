"""`Pipelines`: two hierarchical paths that halve each message, so that one sums while the other sends.

Each has its own memory, process groups and thread. The sum of an element does not depend on which half it is in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives.hierarchical import HierarchicalPath, Span
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.policy import CollectivesConfig
from megatron_rl.collectives.stream_order import StreamOrder

SMALLEST = 1 << 18  # bytes of a half: below, latency counts more than overlap


class Pipelines:
    """Arguments as for `HierarchicalPath`; used by one thread at a time."""

    def __init__(
        self, store: dist.Store, rank: int, nodes: NodeMap, config: CollectivesConfig, device: torch.device
    ) -> None:
        count = 2 if nodes.num_nodes > 1 else 1
        self.paths = [
            HierarchicalPath(dist.PrefixStore(f"pipeline{i}", store), rank, nodes, config) for i in range(count)
        ]
        self._orders = [StreamOrder(device) for _ in self.paths]
        self._threads = ThreadPoolExecutor(max_workers=count, thread_name_prefix="pipeline")

    def all_reduce(self, tensor: Tensor) -> None:
        key = tensor.data_ptr(), tensor.numel()
        self._run(
            tensor.numel(),
            tensor.element_size(),
            lambda path, span: path.all_reduce(tensor[span[0] : span[1]], key),
        )

    def reduce_scatter(self, out: Tensor, tensor: Tensor) -> None:
        key = tensor.data_ptr(), tensor.numel()
        width = tensor.element_size() * (tensor.numel() // max(1, out.numel()))
        self._run(out.numel(), width, lambda path, span: path.reduce_scatter(out, tensor, span, key))

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        width = tensor.element_size() * (out.numel() // max(1, tensor.numel()))
        self._run(tensor.numel(), width, lambda path, span: path.all_gather(out, tensor, span))

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    def _run(self, count: int, width: int, work: Callable[[HierarchicalPath, Span], None]) -> None:
        """``count`` elements (or columns) of ``width`` bytes each, shared out over the paths."""
        if len(self.paths) == 1 or count * width < 2 * SMALLEST:
            work(self.paths[0], (0, count))
            return
        half = count // 2
        begun = [
            self._threads.submit(order.inside(order.mark(), functools.partial(work, path, span)))
            for path, order, span in zip(self.paths, self._orders, ((0, half), (half, count)), strict=True)
        ]
        failures = [future.exception() for future in begun]
        for failure in failures:
            if failure is not None:
                raise failure
