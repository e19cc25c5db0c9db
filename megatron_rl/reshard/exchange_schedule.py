"""The order in which one rank's transfers run: messages no larger than a chunk, in one global order.

Every message belongs to a round, and in a round to a slot in which each rank has one peer at most, as in a round-robin
tournament. A rank starts its exchanges in order of (round, slot, number) and ends them in that order. The earliest
unfinished exchange of the whole job is then always next at both its ends, so there is always progress and no deadlock,
whatever the staging limit. A piece that is passed on belongs to a later round than its arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_rl.reshard.offsets import Offset
from megatron_rl.reshard.plan import RankPlan, Transfer
from megatron_rl.reshard.wire_format import WireFormat


class Piece(NamedTuple):
    """A rectangle inside a message."""

    offset: Offset  # at this end
    forwarded: bool  # the sender reads it from a target shard
    rows: int
    cols: int
    start: int  # elements of the message before it

    @property
    def numel(self) -> int:
        return self.rows * self.cols


class Message(NamedTuple):
    """Pieces packed end to end, of one dtype; sender and receiver compute the same message."""

    dtype: torch.dtype
    numel: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message to and/or one from ``peer``, under way together."""

    round: int
    slot: int
    number: int  # of the messages between these two ranks in this round
    peer: int
    send: Message | None = None
    receive: Message | None = None

    @property
    def forwards(self) -> bool:
        return self.send is not None and any(piece.forwarded for piece in self.send.pieces)


@dataclass(frozen=True, slots=True)
class Chunking:
    """Sizes of messages and rounds. Must be equal on all ranks, which cut their transfers by them.

    Attributes:
        chunk_bytes: no message is larger, except that one element always fits.
        epoch_elements: elements of the model (by position) that share a round; fewer means that passing on starts
            sooner.
    """

    chunk_bytes: int
    epoch_elements: int

    def round_of(self, transfer: Transfer) -> int:
        return transfer.position // self.epoch_elements + transfer.depth


def build_schedule(
    plan: RankPlan, ranks: tuple[int, ...], wire: WireFormat, chunking: Chunking
) -> tuple[Exchange, ...]:
    """The exchanges of ``plan.rank`` in the order in which it starts them.

    Args:
        ranks: all ranks of the job (`ReshardPlan.ranks`), the same at every rank.
    """
    number = {rank: i for i, rank in enumerate(ranks)}
    sends = _streams(((t.dst_rank, t) for t in plan.sends), wire, chunking)
    receives = _streams(((t.src_rank, t) for t in plan.receives), wire, chunking)
    exchanges = []
    for round_, peer in {**sends, **receives}:
        slot = (number[plan.rank] + number[peer]) % len(ranks)
        out, in_ = sends.get((round_, peer), []), receives.get((round_, peer), [])
        for i in range(max(len(out), len(in_))):
            pair = (out[i] if i < len(out) else None, in_[i] if i < len(in_) else None)
            exchanges.append(Exchange(round_, slot, i, peer, *pair))
    return tuple(sorted(exchanges, key=lambda e: (e.round, e.slot, e.number)))


def _streams(
    transfers: Iterable[tuple[int, Transfer]], wire: WireFormat, chunking: Chunking
) -> dict[tuple[int, int], list[Message]]:
    """(round, peer) -> messages."""
    grouped: dict[tuple[int, int], dict[torch.dtype, list[Transfer]]] = {}
    for peer, transfer in transfers:
        by_dtype = grouped.setdefault((chunking.round_of(transfer), peer), {})
        by_dtype.setdefault(wire.of(transfer.tensor), []).append(transfer)
    return {
        key: [
            message
            for dtype in sorted(by_dtype, key=str)
            for message in messages(dtype, ((t.offset, t.depth > 0, *_shape(t)) for t in by_dtype[dtype]), chunking)
        ]
        for key, by_dtype in grouped.items()
    }


def _shape(transfer: Transfer) -> tuple[int, int]:
    return transfer.rectangle.num_rows, transfer.rectangle.num_cols


def messages(
    dtype: torch.dtype, rectangles: Iterable[tuple[Offset, bool, int, int]], chunking: Chunking
) -> Iterator[Message]:
    """Pack ``(offset, forwarded, rows, cols)`` in order. A rectangle of a quarter chunk or more travels alone, so that
    its receiver can take it in place."""
    limit = max(chunking.chunk_bytes // dtype.itemsize, 1)
    pieces: list[Piece] = []
    filled = 0
    for offset, forwarded, rows, cols in rectangles:
        if rows * cols * 4 >= limit:
            yield from (_alone(dtype, piece) for piece in _cut(offset, forwarded, rows, cols, limit))
            continue
        if filled + rows * cols > limit:
            yield Message(dtype, filled, tuple(pieces))
            pieces, filled = [], 0
        pieces.append(Piece(offset, forwarded, rows, cols, filled))
        filled += rows * cols
    if pieces:
        yield Message(dtype, filled, tuple(pieces))


def _alone(dtype: torch.dtype, piece: Piece) -> Message:
    return Message(dtype, piece.numel, (piece,))


def _cut(offset: Offset, forwarded: bool, rows: int, cols: int, limit: int) -> Iterator[Piece]:
    """Bands of rows of about equal size; where one row exceeds ``limit``, bands of columns of each row."""
    if cols <= limit:
        bands = -(-rows // (limit // cols))
        for start, stop in _bands(rows, bands):
            yield Piece(offset._replace(row=offset.row + start), forwarded, stop - start, cols, 0)
        return
    for row in range(rows):
        for start, stop in _bands(cols, -(-cols // limit)):
            yield Piece(Offset(offset.shard, offset.row + row, offset.col + start), forwarded, 1, stop - start, 0)


def _bands(size: int, count: int) -> Iterator[tuple[int, int]]:
    for i in range(count):
        yield i * size // count, (i + 1) * size // count
