"""`Attestor`: proof that what rollout ranks hold is what the trainer holds, without gathering anything.

Every rectangle into which the rollout layout cuts a logical tensor has a slot. The trainer's ranks add up the checksums
of the regions they hold (`ops.span_checksum` is the same for every cut), each region counted once, by the rank that the
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


class Region(NamedTuple):
    """A rectangle of a logical tensor that lies in one of this rank's tensors, and the slot of the sums it adds to."""

    tensor: str
    rectangle: Rectangle
    offset: Offset
    slot: int


class ChecksumSlots:
    """The rectangles of all logical tensors that the target holds, in an order that is the same on all ranks."""

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
class ChecksumDifference:
    """A rectangle that does not hold what it should. Written by `Attestor.differences`."""

    region: Region
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
        self.rank, self.wire, self.slots = rank, wire, ChecksumSlots(plan)
        self.sent = tuple(_sent(plan, rank, self.slots))
        self._sums = Checksums(self.sent, self.slots.count, wire)
        self._held_shapes = {shard.name: shard.shape for shard in plan.target.shards(rank)}
        self._padding = {shard.name: parts for shard in plan.target.shards(rank) if (parts := _padding(shard))}
        self._hold(_held(plan.target, rank, self.slots))

    def _hold(self, held: Iterable[Region]) -> None:
        self.held = tuple(held)
        regions = [region._replace(slot=number) for number, region in enumerate(self.held)]
        self._found = Checksums(regions, len(regions), self.wire)
        self._held_slots = torch.tensor([region.slot for region in self.held], dtype=torch.int64)

    def split(self, buckets: Iterable[Bucket]) -> list[Attestor]:
        """One attestor for the rollout shards of each bucket."""
        regions: dict[str, list[Region]] = {}
        for region in self.held:
            regions.setdefault(region.offset.shard, []).append(region)
        parts = []
        for bucket in buckets:
            part = copy.copy(self)
            part._padding = {name: where for name, where in self._padding.items() if name in bucket.shards}
            names = [name for name in self._held_shapes if name in bucket.shards]
            part._hold(region for name in names for region in regions.get(name, ()))
            parts.append(part)
        return parts

    def part(self, tensors: Mapping[str, Readable]) -> Tensor:
        """What this rank's trainer ``tensors`` (by shard name) add to the expected sums: [num_slots] int64, CPU."""
        return self._sums(tensors)

    def check_dtypes(self, shards: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless this rank's rollout ``shards`` have the dtypes that their values travel in."""
        for region in self.held:
            have, want = shards[region.offset.shard].dtype, self.wire.of(region.tensor)
            if have != want:
                raise ValueError(
                    f"wrong dtype: rollout rank {self.rank} holds {region.offset.shard} in {have}, but {region.tensor} "
                    f"travels in {want}: start the engine in {want}, or push in {have}"
                )

    def differences(self, shards: Mapping[str, Tensor], expected: Tensor) -> list[ChecksumDifference]:
        """Where this rank's rollout ``shards`` differ from the ``expected`` sums of all ranks; see `check_dtypes`."""
        found = self._found(shards)
        differing = (found != expected.cpu()[self._held_slots]).nonzero()[:, 0].tolist()
        return [ChecksumDifference(self.held[i], int(found[i])) for i in differing]

    def dirty_padding(self, shards: Mapping[str, Tensor]) -> list[str]:
        """The shards whose elements outside every span are not all zero."""
        dirty = []
        for name, parts in self._padding.items():
            matrix = shards[name].detach().view(matrix_shape(self._held_shapes[name]))
            if any(matrix[r.slices].count_nonzero() for r in parts):
                dirty.append(name)
        return dirty


class Checksums:
    """The checksums of ``regions``, added up by slot. Values are compared in the dtype in which they travel, to which
    wider tensors are rounded as `copy_spans` does. The tables are made once and serve every push."""

    def __init__(self, regions: Sequence[Region], num_slots: int, wire: WireFormat) -> None:
        self._regions, self._num_slots, self._wire = regions, num_slots, wire
        self._names = list(dict.fromkeys(region.offset.shard for region in regions))
        self._signature: list[tuple[torch.dtype, torch.Size, bool]] = []
        self._groups: list[_Group] = []

    def __call__(self, tensors: Mapping[str, Readable]) -> Tensor:
        """[num_slots] int64, on the CPU; ``tensors`` by shard name."""
        given = [tensors[name] for name in self._names]
        signature = [(tensor.dtype, tensor.shape, isinstance(tensor, LazyTensor)) for tensor in given]
        fresh = signature != self._signature
        if fresh:
            self._groups, self._signature = _grouped(self._regions, tensors, self._wire), signature
        sums = torch.zeros(self._num_slots, dtype=torch.int64)
        for group in self._groups:
            local = {name: read(tensors[name]) for name in group.names}
            if group.table is None:
                sums += _widened(local, group.regions, self._num_slots, group.travels)
            else:
                held = list(local.values())
                as_dtype = None if held[0].dtype == group.travels else group.travels
                sums += span_checksum(held, group.table, self._num_slots, as_dtype=as_dtype, checked=fresh).cpu()
        return sums


class _Group(NamedTuple):
    """Pieces that one `span_checksum` call can take together; without a table their values travel wider than held."""

    travels: torch.dtype
    names: list[str]
    regions: list[Region]
    table: Tensor | None


def _grouped(regions: Iterable[Region], tensors: Mapping[str, Readable], wire: WireFormat) -> list[_Group]:
    groups: dict[tuple[torch.dtype, torch.dtype, str], list[Region]] = {}
    for region in regions:
        tensor = tensors[region.offset.shard]
        alone = region.offset.shard if isinstance(tensor, LazyTensor) else ""  # computed one at a time
        groups.setdefault((tensor.dtype, wire.of(region.tensor), alone), []).append(region)
    made = []
    for (have, travels, _), members in groups.items():
        names = list(dict.fromkeys(region.offset.shard for region in members))
        table = None
        if have == travels or travels.itemsize < have.itemsize:
            numbers = {name: number for number, name in enumerate(names)}
            table = torch.tensor([_row(region, numbers, tensors, travels) for region in members])
        made.append(_Group(travels, names, members, table))
    return made


def _row(
    region: Region, numbers: Mapping[str, int], tensors: Mapping[str, Readable], dtype: torch.dtype
) -> tuple[int, ...]:
    """The columns of `ops.span_checksum.SPAN_COLUMNS`."""
    stride = matrix_shape(tuple(tensors[region.offset.shard].shape))[1]
    at, offset = region.rectangle, region.offset
    start = offset.row * stride + offset.col
    size = (at.num_rows, at.num_cols, stride)
    return (numbers[offset.shard], region.slot, _key(region.tensor, dtype), at.row_start, at.col_start, start, *size)


def _widened(tensors: Mapping[str, Tensor], regions: list[Region], num_slots: int, dtype: torch.dtype) -> Tensor:
    """Checksums of values that travel wider than they are held, a few rows at a time to bound the memory."""
    sums = torch.zeros(num_slots, dtype=torch.int64)
    for region in regions:
        at, offset = region.rectangle, region.offset
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
            place = (0, region.slot, _key(region.tensor, dtype), at.row_start + row, at.col_start, 0)
            sums += span_checksum([part], torch.tensor([[*place, *size]]), num_slots).cpu()
    return sums


@functools.cache
def _key(tensor: str, dtype: torch.dtype) -> int:
    return tensor_key(tensor, dtype)


def _sent(plan: ReshardPlan, rank: int, slots: ChecksumSlots) -> Iterator[Region]:
    """The regions whose checksum ``rank`` contributes: of equal holders, the one that the plan lets send it."""
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
                    yield Region(tensor, rectangle, held.find(tensor, rectangle)[0], slots.first[tensor] + right)


def _held(target: Layout, rank: int, slots: ChecksumSlots) -> Iterator[Region]:
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
                    yield Region(tensor, rectangle, offset, slots.first[tensor] + number)


def _padding(shard: Shard) -> list[Rectangle]:
    """The parts of the shard's matrix under no span."""
    rows, cols = shard.matrix_shape
    if sum(span.numel for span in shard.spans) == rows * cols:
        return []
    whole = Rectangle(0, rows, 0, cols)
    spans = (Rectangle(s.row, s.row + s.num_rows, s.col, s.col + s.num_cols) for s in shard.spans if s.numel)
    parts = disjoint_parts((whole, *dict.fromkeys(spans)))
    return [part.rectangle for part in parts if part.inside == (0,)]
