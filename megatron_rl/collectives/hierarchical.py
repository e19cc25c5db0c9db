"""`HierarchicalPath`: all-reduce, reduce-scatter and all-gather through the memory of each node.

    1  every rank writes its chunk into shared memory
    2  lane l of node i sums its part over the node's ranks, in rank order, in fp32
    3  lanes exchange parts between nodes, and sum what arrives in node order
    4  sums travel back to all nodes, into the shared result, from which every rank reads

An element's sum is ((r0 + r1 + ..) + (.. of node 1) + ..) whatever the chunk, the lane or the link that carried it: one
result, to the bit. 2 (n - 1) / n of the data leaves each of n nodes, the least that an all-reduce can send.
A link that fails is left out and its chunk sent again over the others: what step 2 summed is still there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives.error_feedback import ErrorFeedback
from megatron_rl.collectives.lane import PATIENCE, VOTE, Lane
from megatron_rl.collectives.link import Link, split
from megatron_rl.collectives.node_memory import CollectiveError, NodeMemory
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.policy import CollectivesConfig
from megatron_rl.ops.accumulate import accumulate

logger = logging.getLogger(__name__)

Span = tuple[int, int]  # [start, stop) of elements


class HierarchicalPath:
    """One rank of a group. Made and used collectively, by one thread at a time; after an error it is of no more use.

    Args:
        store: of this group alone (a prefix).
        nodes: where the group's ranks are.
    """

    def __init__(self, store: dist.Store, rank: int, nodes: NodeMap, config: CollectivesConfig) -> None:
        self.nodes, self.config = nodes, config
        self.rank = rank
        self.node, self.index = nodes.place(rank)
        self.chunk_bytes = max(int(config.chunk_mb * 2**20), 64 * nodes.size)
        names = config.links or ("",)
        self.shares = dict.fromkeys(range(len(names)), 1.0)  # of each link that works: the same on all ranks
        self.link_names = [name or "the default interface" for name in names]
        local = dist.PrefixStore(f"node{self.node}", store)
        # A rank waits for one that waits for a failed link, and then for the vote on it.
        patience = 2 * VOTE * config.timeout_seconds + 5
        members = len(nodes.nodes[self.node])
        self._memory = NodeMemory(local, self.index, members, self.chunk_bytes, self.chunk_bytes, patience)
        self._feedback = ErrorFeedback(config.error_feedback)
        self._lane = None
        if nodes.num_nodes > 1 and self.index < nodes.lanes:
            self._lane = Lane(self._links(store, names), self.node, config.timeout_seconds)

    def _links(self, store: dist.Store, names: Sequence[str]) -> list[Link]:
        stores = [dist.PrefixStore(f"lane{self.index}/link{k}", store) for k in range(len(names))]
        limit = self.config.timeout_seconds * (PATIENCE + 1 if len(names) > 1 else 1)
        return [
            Link(own, self.node, self.nodes.num_nodes, name, limit) for own, name in zip(stores, names, strict=True)
        ]

    def all_reduce(self, tensor: Tensor, key: object = None) -> None:
        """Sum in place.

        Args:
            tensor: flat, contiguous, fp32 or bf16, on CPU.
            key: names the buffer, for error feedback.
        """
        for start in range(0, tensor.numel(), self.chunk_bytes // tensor.element_size()):
            chunk = tensor[start : start + self.chunk_bytes // tensor.element_size()]
            self._memory.slot(self.index, chunk.dtype)[: chunk.numel()].copy_(chunk)
            self._memory.barrier()
            spans = self._lane_spans(split(chunk.numel(), [1] * self.nodes.num_nodes))
            sums, result = self._node_sums(chunk.dtype, spans), self._memory.result(chunk.dtype)

            def deliver(sums=sums, spans=spans, result=result, key=(key, start)) -> None:
                total = self._exchanged(sums, result.dtype, key)
                self._spread(total, [result[a:b] for a, b in spans], key)

            self._until_delivered(deliver)
            chunk.copy_(result[: chunk.numel()])

    def reduce_scatter(self, out: Tensor, tensor: Tensor, columns: Span, key: object = None) -> None:
        """``out`` = this rank's part of the sum; of each part only the elements of ``columns``.

        Args:
            out: ``[part]``; flat and contiguous, as ``tensor``.
            tensor: ``[size * part]``, the parts in rank order; fp32 or bf16, on CPU; not changed.
            key: names the buffer, for error feedback.
        """
        rows, size = tensor.view(self.nodes.size, -1), self.nodes.size
        for start, stop in self._pieces(columns, tensor.element_size()):
            width = stop - start
            slot = self._memory.slot(self.index, tensor.dtype)[: size * width].view(size, width)
            for at, rank in enumerate(self.nodes.order):
                slot[at].copy_(rows[rank, start:stop])
            self._memory.barrier()
            spans = self._lane_spans([len(ranks) * width for ranks in self.nodes.nodes])
            sums, result = self._node_sums(tensor.dtype, spans), self._memory.result(tensor.dtype)
            first = self.nodes.first(self.node) * width

            def deliver(sums=sums, spans=spans, result=result, first=first, key=(key, start)) -> None:
                begin, end = spans[self.node]
                result[begin - first : end - first].copy_(self._exchanged(sums, result.dtype, key))

            self._until_delivered(deliver)
            out[start:stop].copy_(result[self.index * width : (self.index + 1) * width])

    def all_gather(self, out: Tensor, tensor: Tensor, columns: Span) -> None:
        """``out`` = the parts of all ranks, in rank order; of each part only the elements of ``columns``.

        Args:
            out: ``[size * part]``; flat and contiguous, as ``tensor``.
            tensor: ``[part]``; any dtype, on CPU; it may be this rank's part of ``out``.
        """
        part, rows, size = tensor.view(torch.uint8), out.view(torch.uint8).view(self.nodes.size, -1), self.nodes.size
        result, width = self._memory.result(torch.uint8), tensor.element_size()
        for start, stop in self._pieces((columns[0] * width, columns[1] * width), 1):
            width = stop - start
            mine = (self.nodes.first(self.node) + self.index) * width
            self._memory.barrier()  # until here others may read the last result
            result[mine : mine + width].copy_(part[start:stop])
            self._memory.barrier()
            spans = self._lane_spans([len(ranks) * width for ranks in self.nodes.nodes])

            def deliver(spans=spans) -> None:
                begin, end = spans[self.node]
                self._spread(result[begin:end], [result[a:b] for a, b in spans])

            self._until_delivered(deliver)
            gathered = result[: size * width].view(size, width)
            for at, rank in enumerate(self.nodes.order):
                rows[rank, start:stop].copy_(gathered[at])

    # One chunk

    def _pieces(self, columns: Span, element_bytes: int) -> Iterator[Span]:
        """Ranges of ``columns`` of which all ranks' parts fill a chunk."""
        width = max(1, self.chunk_bytes // (element_bytes * self.nodes.size))
        for start in range(*columns, width):
            yield start, min(start + width, columns[1])

    def _lane_spans(self, sizes: Sequence[int]) -> list[Span]:
        """This lane's part of each node's block, the blocks of ``sizes`` elements end to end; [] on other ranks."""
        spans, first = [], 0
        for size in sizes if self.index < self.nodes.lanes else ():
            parts = split(size, [1] * self.nodes.lanes)
            start = first + sum(parts[: self.index])
            spans.append((start, start + parts[self.index]))
            first += size
        return spans

    def _node_sums(self, dtype: torch.dtype, spans: Sequence[Span]) -> list[Tensor]:
        """Step 2: for each node, flat fp32."""
        slots = [self._memory.slot(index, dtype) for index in range(self._memory.size)]
        return [accumulate([slot[a:b] for slot in slots], torch.empty(b - a)) for a, b in spans]

    def _exchanged(self, sums: list[Tensor], dtype: torch.dtype, key: object) -> Tensor:
        """Step 3: the sum over all nodes of this lane's part of this node's block, flat fp32."""
        if self._lane is None:
            return sums[0]
        wire = self._wire(dtype)
        parts = [self._feedback.rounded((key, node), part, wire) for node, part in enumerate(sums)]
        return self._lane.reduce(parts, self.shares)

    def _spread(self, own: Tensor, wholes: list[Tensor], key: object = None) -> None:
        """Step 4: this lane's part to all nodes, and theirs into ``wholes``."""
        if self._lane is None:
            wholes[0].copy_(own)
            return
        wire = self._wire(wholes[0].dtype) if own.dtype == torch.float32 else own.dtype
        self._lane.gather(self._feedback.rounded((key, "sum"), own, wire), wholes, self.shares)

    def _wire(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if self.config.wire_dtype == "bfloat16" else dtype

    def _until_delivered(self, deliver: Callable[[], None]) -> None:
        """Run ``deliver`` on the lanes until every node has what it needs; every rank of the group takes part.

        Raises:
            CollectiveError: no link is left.
        """
        while True:
            if self.index < self.nodes.lanes:
                deliver()
            failed = self._failed_links()
            if not failed:
                self._feedback.commit()
                return
            self._leave_out(failed)

    def _failed_links(self) -> int:
        """Links that failed on some rank of the group, as a mask. Ends in a barrier of the node."""
        self._memory.say(self._lane.take_failures() if self._lane else 0)
        self._memory.barrier()
        if self.nodes.num_nodes == 1:
            return 0
        if self.index == 0 and self._lane is not None:
            mask = 0
            for word in self._memory.heard():
                mask |= word
            verdict = self._lane.vote(mask, [k for k in self.shares if not mask >> k & 1])
            self._memory.say(sum(1 << k for k in self.shares) if verdict is None else verdict)
        self._memory.barrier()
        return self._memory.heard()[0]

    def _leave_out(self, failed: int) -> None:
        names = ", ".join(self.link_names[k] for k in self.shares if failed >> k & 1)
        why = "; ".join(self._lane.reasons.values()) if self._lane else "another rank saw it"
        self.shares = {k: share for k, share in self.shares.items() if not failed >> k & 1}
        if not self.shares:
            raise CollectiveError(
                f"no link between the {self.nodes.num_nodes} nodes is left: {names} failed or took longer than "
                f"{self.config.timeout_seconds:g} s ({why})"
            )
        left = ", ".join(self.link_names[k] for k in self.shares)
        logger.warning("reductions leave out %s, which failed (%s); what is left is %s", names, why, left)
