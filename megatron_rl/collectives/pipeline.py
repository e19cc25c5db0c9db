"""`Pipeline`: carries the pieces of a message through node memory and between nodes, five of them under way at once.

At turn t a rank reads the result of piece t - 4 and writes piece t + 1; a lane sums piece t and sends its parts, sums
what arrived of piece t - 2 and sends the sum on, so that the links always have a piece to carry while ranks meet. Nodes
agree after `WINDOW` pieces: a link that failed is left out and all of them are sent again over the others, for lanes
keep what they sent until then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives.error_feedback import ErrorFeedback
from megatron_rl.collectives.lane import PATIENCE, VOTE, Exchange, Lane
from megatron_rl.collectives.link import Link, split
from megatron_rl.collectives.node_memory import CollectiveError, NodeMemory
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.policy import CollectivesConfig
from megatron_rl.collectives.staging import Staging

logger = logging.getLogger(__name__)

LEAD = 2  # turns from the sending of a piece's parts to their sum
STEPS = LEAD + 2  # turns from a piece's parts to the reading of its result
SLOTS, RESULTS = 2, STEPS + 1  # pieces in node memory: written and summed; from expected to read
AHEAD = LEAD + 1  # turns by which receives are announced before their data is sent
WINDOW = 64  # pieces between two agreements of the nodes

Span = tuple[int, int]  # [start, stop) of elements


@dataclass(frozen=True)
class Kind:
    """What a collective does with the ranks' inputs."""

    dtype: torch.dtype
    sums: bool  # they are added; else they stand side by side
    spreads: bool  # every node gets all blocks of the result; else its own


@dataclass
class Piece:
    """A part of a message. The collective writes the first four fields, the lane the others."""

    write: Callable[[Tensor], None]  # this rank's input into its slot
    read: Callable[[Tensor], None]  # this rank's output from the result
    blocks: Sequence[int]  # elements of each node's block, which lie end to end
    key: object = None  # for error feedback
    spans: list[Span] = field(default_factory=list)  # this lane's part of each block
    parts: list[Tensor] = field(default_factory=list)  # sums of this node for each node, kept until all have them
    own: Tensor = field(default_factory=lambda: torch.empty(0))  # what every node gets from this lane
    arrived: list[Tensor] = field(default_factory=list)  # parts of the other nodes
    arriving: Exchange | None = None
    wholes: list[Tensor] = field(default_factory=list)  # what arrives of each block
    spreading: Exchange | None = None


class Pipeline:
    """One rank of a group. Made and used collectively, by one thread at a time; after an error it is of no more use.

    Args:
        store: of this group alone (a prefix).
        nodes: where the group's ranks are.
        device: of the tensors that pieces are written from and read to.
    """

    def __init__(
        self, store: dist.Store, rank: int, nodes: NodeMap, config: CollectivesConfig, device: torch.device
    ) -> None:
        self.nodes, self.config = nodes, config
        self.node, self.index = nodes.place(rank)
        self.piece_bytes = max(int(config.chunk_mb * 2**20), 64 * nodes.size)
        names = config.links or ("",)
        self.shares = dict.fromkeys(range(len(names)), 1.0)  # of each link that works: the same on all ranks
        self.link_names = [name or "the default interface" for name in names]
        local = dist.PrefixStore(f"node{self.node}", store)
        # A rank waits for one that waits for a failed link, and then for the vote on it.
        patience = 2 * VOTE * config.timeout_seconds + 5
        members = len(nodes.nodes[self.node])
        self._memory = NodeMemory(local, self.index, members, self.piece_bytes, SLOTS, RESULTS, patience)
        self.staging = Staging(device, self._memory)
        self._feedback = ErrorFeedback(config.error_feedback)
        self._is_lane = self.index < nodes.lanes
        self._lane = None
        if nodes.num_nodes > 1 and self._is_lane:
            self._lane = Lane(self._links(store, names), self.node, config.timeout_seconds)
        self._kept: dict[tuple[str, int], Tensor] = {}

    def _links(self, store: dist.Store, names: Sequence[str]) -> list[Link]:
        stores = [dist.PrefixStore(f"lane{self.index}/link{k}", store) for k in range(len(names))]
        limit = self.config.timeout_seconds * (PATIENCE + 1 if len(names) > 1 else 1)
        return [
            Link(own, self.node, self.nodes.num_nodes, name, limit) for own, name in zip(stores, names, strict=True)
        ]

    def deliver(self, kind: Kind, pieces: Sequence[Piece]) -> None:
        """Carry out a collective.

        Raises:
            CollectiveError: no link is left, or a rank is gone.
        """
        for first in range(0, len(pieces), WINDOW):
            window = pieces[first : first + WINDOW]
            self._carry(kind, window, again=False)
            while failed := self._failed_links():
                self._leave_out(failed)
                self._carry(kind, window, again=True)
            self._feedback.commit()

    def close(self) -> None:
        """End the threads, and give the memory back."""
        if self._lane is not None:
            self._lane.close()
        self.staging.close()

    def _carry(self, kind: Kind, pieces: Sequence[Piece], again: bool) -> None:
        """All pieces from slots to results; ``again``: what lanes send is known from the last time."""
        if not again:
            pieces[0].write(self._memory.slot(self.index, 0, kind.dtype))
        if self._lane is not None:
            for turn, piece in enumerate(pieces[:AHEAD]):
                self._expect_parts(kind, piece, turn)
            if self.index == 0:
                self._lane.expect_vote(self.shares)
        for turn in range(len(pieces) + STEPS):
            last = turn - STEPS
            if last >= 0 and self._lane is not None:
                self._land(kind, pieces[last], last)
            if last + 1 == len(pieces):
                self._memory.say(self._lane.take_failures() if self._lane else 0)
            self.staging.finish()
            self._memory.barrier()  # slots of this turn are written, the result of the last piece is whole
            if self._is_lane and turn < len(pieces):  # first of all: links wait for it
                if not again:
                    self._take_parts(kind, pieces[turn], turn)
                self._send_parts(kind, pieces, turn)
            if turn + 1 < len(pieces) and not again:
                pieces[turn + 1].write(self._memory.slot(self.index, turn + 1, kind.dtype))
            if last >= 0:
                pieces[last].read(self._memory.result(last, kind.dtype))
            if self._lane is not None and 0 <= turn - LEAD < len(pieces):
                self._spread(kind, pieces[turn - LEAD], turn - LEAD)

    # What a lane does with a piece

    def _take_parts(self, kind: Kind, piece: Piece, turn: int) -> None:
        """From the node's slots: for each node, the sum of this lane's part of its block; or the part itself."""
        piece.spans = self._lane_spans(piece.blocks)
        slots = [self._memory.slot(index, turn, kind.dtype) for index in range(self._memory.size)]
        if not kind.sums:
            start, stop = piece.spans[self.node]
            first = sum(piece.blocks[: self.node])
            block = [slot[: piece.blocks[self.node] // len(slots)] for slot in slots]
            piece.own = self._keep("own", turn, stop - start, kind.dtype)
            _copy_range(block, start - first, piece.own)
        elif self._lane is None:
            (start, stop), result = piece.spans[0], self._memory.result(turn, kind.dtype)
            self.staging.sum([slot[start:stop] for slot in slots], result[start:stop])
        else:
            wire = self._wire(kind)
            exact = torch.float32 if self._feedback.enabled else wire
            sizes = [stop - start for start, stop in piece.spans]
            piece.parts = list(self._keep("parts", turn, sum(sizes), exact).split(sizes))
            for node, (part, (start, stop)) in enumerate(zip(piece.parts, piece.spans, strict=True)):
                self.staging.sum([slot[start:stop] for slot in slots], part)
                piece.parts[node] = self._feedback.rounded((piece.key, node), part, wire)

    def _expect_parts(self, kind: Kind, piece: Piece, turn: int) -> None:
        assert self._lane is not None
        if not kind.sums:
            return
        start, stop = self._lane_spans(piece.blocks)[self.node]
        sizes = [stop - start] * self.nodes.num_nodes
        piece.arrived = list(
            self._keep("arrived", turn % (LEAD + AHEAD + 1), sum(sizes), self._wire(kind)).split(sizes)
        )
        piece.arriving = self._lane.expect(piece.arrived, self.shares)

    def _send_parts(self, kind: Kind, pieces: Sequence[Piece], turn: int) -> None:
        """Send the parts; before them, announce what comes next to be received."""
        piece, result = pieces[turn], self._memory.result(turn, kind.dtype)
        if self._lane is None:
            if not kind.sums:
                start, stop = piece.spans[0]
                result[start:stop].copy_(piece.own)
            return
        if turn + AHEAD < len(pieces):
            self._expect_parts(kind, pieces[turn + AHEAD], turn + AHEAD)
        if kind.spreads:
            wire, sizes = self._wire(kind), [stop - start for start, stop in piece.spans]
            piece.wholes = [result[start:stop] for start, stop in piece.spans]
            if wire != kind.dtype:
                piece.wholes = list(self._keep("wholes", turn % RESULTS, sum(sizes), wire).split(sizes))
            piece.spreading = self._lane.expect(piece.wholes, self.shares)
        if piece.arriving is not None:
            self._lane.send(piece.arriving, piece.parts)

    def _spread(self, kind: Kind, piece: Piece, turn: int) -> None:
        """Sum over the nodes what arrived for this one, and send the sum to all, or keep it."""
        assert self._lane is not None
        start, stop = piece.spans[self.node]
        mine = self._memory.result(turn, kind.dtype)[start:stop]
        if piece.arriving is not None:
            self._lane.finish(piece.arriving)
            piece.arrived[self.node] = piece.parts[self.node]
            if not kind.spreads:
                self.staging.sum(piece.arrived, mine)
                return
            wire, total = self._wire(kind), mine
            if self._feedback.enabled or wire != kind.dtype:
                exact = torch.float32 if self._feedback.enabled else wire
                total = self._keep("own", turn % RESULTS, stop - start, exact)
            self.staging.sum(piece.arrived, total)
            piece.own = total if total is mine else self._feedback.rounded((piece.key, "sum"), total, wire)
        assert piece.spreading is not None
        self._lane.send(piece.spreading, [piece.own] * self.nodes.num_nodes)
        piece.wholes[self.node] = piece.own
        if piece.own is not mine:
            mine.copy_(piece.own)

    def _land(self, kind: Kind, piece: Piece, turn: int) -> None:
        """Wait until all blocks have arrived in the result."""
        assert self._lane is not None
        if piece.spreading is None:
            return
        self._lane.finish(piece.spreading)
        if self._wire(kind) != kind.dtype:
            result = self._memory.result(turn, kind.dtype)
            for (start, stop), whole in zip(piece.spans, piece.wholes, strict=True):
                result[start:stop].copy_(whole)

    def _lane_spans(self, blocks: Sequence[int]) -> list[Span]:
        spans, first = [], 0
        for size in blocks:
            parts = split(size, [1] * self.nodes.lanes)
            start = first + sum(parts[: self.index])
            spans.append((start, start + parts[self.index]))
            first += size
        return spans

    def _wire(self, kind: Kind) -> torch.dtype:
        return torch.bfloat16 if kind.sums and self.config.wire_dtype == "bfloat16" else kind.dtype

    def _keep(self, name: str, turn: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory of this lane, the same for later messages: new memory costs a page fault every 4 KB."""
        num_bytes, held = numel * dtype.itemsize, self._kept.get((name, turn))
        if held is None or held.numel() < num_bytes:
            held = self._kept[name, turn] = torch.empty(num_bytes, dtype=torch.uint8)
        return held[:num_bytes].view(dtype)

    # Agreement

    def _failed_links(self) -> int:
        """Links that failed on some rank of the group, as a mask. Every rank has said by now which it saw fail."""
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


def _copy_range(block: Sequence[Tensor], start: int, out: Tensor) -> None:
    """``out`` = that many elements from ``start`` on of equally long tensors end to end."""
    size, done = block[0].numel(), 0
    while done < out.numel():
        index, at = divmod(start + done, size)
        count = min(size - at, out.numel() - done)
        out[done : done + count].copy_(block[index][at : at + count])
        done += count
