"""`Attestor`: proof that what rollout ranks hold is what the trainer holds, without gathering anything.

Every rectangle into which the rollout layout cuts a logical tensor has a slot. The trainer's ranks add up the checksums
of the pieces they hold (`ops.span_checksum` is the same for every cut), each piece counted once, by the rank that the
plan lets send it. One sum over all ranks gives each slot's expected value, and each rollout rank compares all that it
holds, repeated parts too, with it. Padding must be zero. Layouts decide what is checked, not the plan of the transfer.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.ops.span_checksum import span_checksum, tensor_key
from megatron_rl.reshard import Layout, Readable, ReshardPlan, Shard, WireFormat
from megatron_rl.reshard.buckets import Bucket
from megatron_rl.reshard.layout import matrix_shape
from megatron_rl.reshard.lazy_tensor import LazyTensor, read
from megatron_rl.reshard.offsets import Offset, Offsets
from megatron_rl.reshard.rectangle import Rectangle, cross, disjoint_parts

CONVERTED_ELEMENTS = 1 << 20  # widened to the wire dtype at a time


class Piece(NamedTuple):
    """A rectangle of a logical tensor that lies in one of this rank's tensors, and the slot of the sums it adds to."""

    tensor: str
    rectangle: Rectangle
    offset: Offset
    slot: int


class Slots:
    """The rectangles of all logical tensors that the target holds, numbered alike on all ranks."""

    def __init__(self, plan: ReshardPlan) -> None:
        tensors = plan.source_index.tensors
        self.patterns = {tensor: pattern for tensor, pattern in plan.wanted(tensors).items() if tensor in tensors}
        counts = (len(pattern.rectangles) for pattern in self.patterns.values())
        *starts, self.count = itertools.accumulate(counts, initial=0)
        self.first = dict(zip(self.patterns, starts, strict=True))

    def __iter__(self) -> Iterator[tuple[int, str, Rectangle]]:
        """Number, logical tensor and rectangle of each."""
        for tensor, pattern in self.patterns.items():
            for number, rectangle in enumerate(pattern.rectangles, self.first[tensor]):
                yield number, tensor, rectangle


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A rectangle that does not hold what it should. Written by `Attestor.mismatches`."""

    piece: Piece
    found: int  # the checksum


class Attestor:
    """One rank's part of the proof.

    Args:
        plan: of the transfer; used for its layouts and their indexes.
        wire: the dtype in which each tensor is compared.

    Raises:
        ValueError: malformed layouts.
    """

    def __init__(self, plan: ReshardPlan, rank: int, wire: WireFormat) -> None:
        self.rank, self.wire, self.slots = rank, wire, Slots(plan)
        self.sent = tuple(_sent(plan, rank, self.slots))
        self._sums = Checksums(self.sent, self.slots.count, wire)
        self._held_shapes = {shard.name: shard.shape for shard in plan.target.shards(rank)}
        self._padding = {shard.name: parts for shard in plan.target.shards(rank) if (parts := _padding(shard))}
        self._hold(_held(plan.target, rank, self.slots))

    def _hold(self, held: Iterable[Piece]) -> None:
        self.held = tuple(held)
        pieces = [piece._replace(slot=number) for number, piece in enumerate(self.held)]
        self._found = Checksums(pieces, len(pieces), self.wire)
        self._held_slots = torch.tensor([piece.slot for piece in self.held], dtype=torch.int64)

    def split(self, buckets: Iterable[Bucket]) -> list[Attestor]:
        """One attestor for the rollout shards of each bucket."""
        pieces: dict[str, list[Piece]] = {}
        for piece in self.held:
            pieces.setdefault(piece.offset.shard, []).append(piece)
        parts = []
        for bucket in buckets:
            part = copy.copy(self)
            part._padding = {name: where for name, where in self._padding.items() if name in bucket.shards}
            part._hold(piece for name in self._held_shapes if name in bucket.shards for piece in pieces.get(name, ()))
            parts.append(part)
        return parts

    def part(self, tensors: Mapping[str, Readable]) -> Tensor:
        """What this rank's trainer ``tensors`` (by shard name) add to the expected sums: [num_slots] int64, CPU."""
        return self._sums(tensors)

    def check_dtypes(self, shards: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless this rank's rollout ``shards`` have the dtypes that their values travel in."""
        for piece in self.held:
            have, want = shards[piece.offset.shard].dtype, self.wire.of(piece.tensor)
            if have != want:
                raise ValueError(
                    f"wrong dtype: rollout rank {self.rank} holds {piece.offset.shard} in {have}, but {piece.tensor} "
                    f"travels in {want}: start the engine in {want}, or push in {have}"
                )

    def mismatches(self, shards: Mapping[str, Tensor], expected: Tensor) -> list[Mismatch]:
        """Where this rank's rollout ``shards`` differ from the ``expected`` sums of all ranks; see `check_dtypes`."""
        found = self._found(shards)
        differing = (found != expected.cpu()[self._held_slots]).nonzero()[:, 0].tolist()
        return [Mismatch(self.held[i], int(found[i])) for i in differing]

    def dirty_padding(self, shards: Mapping[str, Tensor]) -> list[str]:
        """The shards whose elements outside every span are not all zero."""
        dirty = []
        for name, parts in self._padding.items():
            matrix = shards[name].detach().view(matrix_shape(self._held_shapes[name]))
            if any(matrix[r.row_start : r.row_stop, r.col_start : r.col_stop].count_nonzero() for r in parts):
                dirty.append(name)
        return dirty


class Checksums:
    """The checksums of ``pieces``, added up by slot. Values are compared in the dtype in which they travel, to which
    wider tensors are rounded as `copy_spans` does. The tables are made once and serve every push."""

    def __init__(self, pieces: Sequence[Piece], num_slots: int, wire: WireFormat) -> None:
        self._pieces, self._num_slots, self._wire = pieces, num_slots, wire
        self._names = list(dict.fromkeys(piece.offset.shard for piece in pieces))
        self._signature: list[tuple[torch.dtype, torch.Size, bool]] = []
        self._groups: list[_Group] = []

    def __call__(self, tensors: Mapping[str, Readable]) -> Tensor:
        """[num_slots] int64, on the CPU; ``tensors`` by shard name."""
        given = [tensors[name] for name in self._names]
        signature = [(tensor.dtype, tensor.shape, isinstance(tensor, LazyTensor)) for tensor in given]
        fresh = signature != self._signature
        if fresh:
            self._groups, self._signature = _grouped(self._pieces, tensors, self._wire), signature
        sums = torch.zeros(self._num_slots, dtype=torch.int64)
        for group in self._groups:
            local = {name: read(tensors[name]) for name in group.names}
            if group.table is None:
                sums += _widened(local, group.pieces, self._num_slots, group.travels)
            else:
                held = list(local.values())
                as_dtype = None if held[0].dtype == group.travels else group.travels
                sums += span_checksum(held, group.table, self._num_slots, as_dtype=as_dtype, checked=fresh).cpu()
        return sums


class _Group(NamedTuple):
    """Pieces that one `span_checksum` call can take together; without a table their values travel wider than held."""

    travels: torch.dtype
    names: list[str]
    pieces: list[Piece]
    table: Tensor | None


def _grouped(pieces: Iterable[Piece], tensors: Mapping[str, Readable], wire: WireFormat) -> list[_Group]:
    groups: dict[tuple[torch.dtype, torch.dtype, str], list[Piece]] = {}
    for piece in pieces:
        tensor = tensors[piece.offset.shard]
        alone = piece.offset.shard if isinstance(tensor, LazyTensor) else ""  # computed one at a time
        groups.setdefault((tensor.dtype, wire.of(piece.tensor), alone), []).append(piece)
    made = []
    for (have, travels, _), members in groups.items():
        names = list(dict.fromkeys(piece.offset.shard for piece in members))
        table = None
        if have == travels or travels.itemsize < have.itemsize:
            numbers = {name: number for number, name in enumerate(names)}
            table = torch.tensor([_row(piece, numbers, tensors, travels) for piece in members])
        made.append(_Group(travels, names, members, table))
    return made


def _row(
    piece: Piece, numbers: Mapping[str, int], tensors: Mapping[str, Readable], dtype: torch.dtype
) -> tuple[int, ...]:
    """The columns of `ops.span_checksum.SPAN_COLUMNS`."""
    stride = matrix_shape(tuple(tensors[piece.offset.shard].shape))[1]
    at, offset = piece.rectangle, piece.offset
    start = offset.row * stride + offset.col
    size = (at.num_rows, at.num_cols, stride)
    return (numbers[offset.shard], piece.slot, _key(piece.tensor, dtype), at.row_start, at.col_start, start, *size)


def _widened(tensors: Mapping[str, Tensor], pieces: list[Piece], num_slots: int, dtype: torch.dtype) -> Tensor:
    """Checksums of values that travel wider than they are held, a few rows at a time to bound the memory."""
    sums = torch.zeros(num_slots, dtype=torch.int64)
    for piece in pieces:
        at, offset = piece.rectangle, piece.offset
        matrix = tensors[offset.shard].detach().view(matrix_shape(tuple(tensors[offset.shard].shape)))
        step = max(1, CONVERTED_ELEMENTS // at.num_cols)
        for row in range(0, at.num_rows, step):
            stop = min(row + step, at.num_rows)
            part = (
                matrix[offset.row + row : offset.row + stop, offset.col : offset.col + at.num_cols]
                .to(dtype)
                .contiguous()
            )
            size = (stop - row, at.num_cols, at.num_cols)
            place = (0, piece.slot, _key(piece.tensor, dtype), at.row_start + row, at.col_start, 0)
            sums += span_checksum([part], torch.tensor([[*place, *size]]), num_slots).cpu()
    return sums


@functools.cache
def _key(tensor: str, dtype: torch.dtype) -> int:
    return tensor_key(tensor, dtype)


def _sent(plan: ReshardPlan, rank: int, slots: Slots) -> Iterator[Piece]:
    """The pieces whose checksum ``rank`` contributes: of equal holders, the one whose turn it is to send."""
    if rank not in plan.source.replica_of:
        return
    held = Offsets(plan.source.shards(rank), f"{plan.source.name}, rank {rank}")
    numbers = {replica: number for number, replica in enumerate(plan.source.replicas)}
    mine, replicas = numbers[plan.source.replica_of[rank]], list(plan.source.replicas.values())
    for tensor in held:
        source = plan.source_index.tensors[tensor]
        if tensor not in slots.patterns:
            continue
        for left, right, rectangle in cross(source.pattern.rectangles, slots.patterns[tensor].rectangles):
            holding = source.pattern.replicas[left]
            if mine in holding:
                ranks = sorted(holder for replica in holding for holder in replicas[replica])
                if ranks[source.shares[left]] == rank:
                    yield Piece(tensor, rectangle, held.find(tensor, rectangle)[0], slots.first[tensor] + right)


def _held(target: Layout, rank: int, slots: Slots) -> Iterator[Piece]:
    """Everything that ``rank`` holds of the rollout weights, what it holds twice included."""
    if rank not in target.replica_of:
        return
    offsets = Offsets(target.shards(rank), f"{target.name}, rank {rank}")
    mine = tuple(target.replicas).index(target.replica_of[rank])
    for tensor in offsets:
        pattern = slots.patterns[tensor]
        for number, (rectangle, replicas) in enumerate(zip(pattern.rectangles, pattern.replicas, strict=True)):
            if mine in replicas:
                for offset in offsets.find(tensor, rectangle):
                    yield Piece(tensor, rectangle, offset, slots.first[tensor] + number)


def _padding(shard: Shard) -> list[Rectangle]:
    """The parts of the shard's matrix under no span."""
    rows, cols = shard.matrix_shape
    if sum(span.numel for span in shard.spans) == rows * cols:
        return []
    whole = Rectangle(0, rows, 0, cols)
    spans = (Rectangle(s.row, s.row + s.num_rows, s.col, s.col + s.num_cols) for s in shard.spans if s.numel)
    parts = disjoint_parts((whole, *dict.fromkeys(spans)))
    return [part.rectangle for part in parts if part.inside == (0,)]
