"""`HierarchicalPath`: all-reduce, reduce-scatter and all-gather through the memory of each node.

    1  every rank writes a piece into shared memory
    2  lane l of node i sums its part over the node's ranks, in rank order, in fp32, and sends it to the node it is for
    3  there lane l sums what arrives, in node order, and sends the sum to all nodes
    4  sums arrive in the shared result, from which every rank reads

An element's sum is ((r0 + r1 + ..) + (.. of node 1) + ..) whatever the piece, the lane or the link that carried it: one
result, to the bit. 2 (n - 1) / n of the data leaves each of n nodes, the least that an all-reduce can send.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives.cost_model import piece_spans
from megatron_rl.collectives.link import split
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.pipeline import Kind, Piece, Pipeline, Span
from megatron_rl.collectives.policy import CollectivesConfig


class HierarchicalPath:
    """Arguments as for `Pipeline`."""

    def __init__(
        self, store: dist.Store, rank: int, nodes: NodeMap, config: CollectivesConfig, device: torch.device
    ) -> None:
        self.nodes, self.rank = nodes, rank
        self.pipeline = Pipeline(store, rank, nodes, config, device)
        self._staging = self.pipeline.staging

    def all_reduce(self, tensor: Tensor, key: object = None) -> None:
        """Sum in place.

        Args:
            tensor: flat, contiguous, fp32 or bf16.
            key: names the buffer, for error feedback.
        """
        pieces = []
        for start, stop in self._ranges(tensor.numel(), tensor.element_size()):

            def write(slot: Tensor, part: Tensor = tensor[start:stop]) -> None:
                self._staging.copy(slot[: part.numel()], part)

            def read(result: Tensor, part: Tensor = tensor[start:stop]) -> None:
                self._staging.copy(part, result[: part.numel()])

            blocks = split(stop - start, [1] * self.nodes.num_nodes)
            pieces.append(Piece(write, read, blocks, key=(key, start)))
        self.pipeline.deliver(Kind(tensor.dtype, sums=True, spreads=True), pieces)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, key: object = None) -> None:
        """``out`` = this rank's part of the sum.

        Args:
            out: ``[part]``; flat and contiguous, as ``tensor``.
            tensor: ``[size * part]``, the parts in rank order; fp32 or bf16; not changed.
            key: names the buffer, for error feedback.
        """
        rows, pieces = tensor.view(self.nodes.size, -1), []
        for start, stop in self._ranges(out.numel(), tensor.element_size() * self.nodes.size):

            def write(slot: Tensor, start: int = start, stop: int = stop) -> None:
                by_rank = slot[: self.nodes.size * (stop - start)].view(self.nodes.size, -1)
                for at, rank in enumerate(self.nodes.order):
                    self._staging.copy(by_rank[at], rows[rank, start:stop])

            def read(result: Tensor, start: int = start, stop: int = stop) -> None:
                by_rank = result[: self.nodes.size * (stop - start)].view(self.nodes.size, -1)
                self._staging.copy(out[start:stop], by_rank[self.nodes.order.index(self.rank)])

            pieces.append(Piece(write, read, self._rank_blocks(stop - start), key=(key, start)))
        self.pipeline.deliver(Kind(tensor.dtype, sums=True, spreads=False), pieces)

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """``out`` = the parts of all ranks, in rank order.

        Args:
            out: ``[size * part]``; flat and contiguous, as ``tensor``.
            tensor: ``[part]``; any dtype; it may be this rank's part of ``out``.
        """
        part, rows, pieces = tensor.view(torch.uint8), out.view(torch.uint8).view(self.nodes.size, -1), []
        for start, stop in self._ranges(part.numel(), self.nodes.size):

            def write(slot: Tensor, start: int = start, stop: int = stop) -> None:
                self._staging.copy(slot[: stop - start], part[start:stop])

            def read(result: Tensor, start: int = start, stop: int = stop) -> None:
                by_rank = result[: self.nodes.size * (stop - start)].view(self.nodes.size, -1)
                for at, rank in enumerate(self.nodes.order):
                    self._staging.copy(rows[rank, start:stop], by_rank[at])

            pieces.append(Piece(write, read, self._rank_blocks(stop - start)))
        self.pipeline.deliver(Kind(torch.uint8, sums=False, spreads=True), pieces)

    def close(self) -> None:
        """End the threads, and give the memory back."""
        self.pipeline.close()

    def _ranges(self, count: int, element_bytes: int) -> Iterator[Span]:
        """``count`` elements (or columns) of so many bytes, in pieces."""
        return piece_spans(count, element_bytes, self.pipeline.piece_bytes)

    def _rank_blocks(self, width: int) -> list[int]:
        return [len(ranks) * width for ranks in self.nodes.nodes]
