"""`Binding`: one rank's local tensors behind the names of a plan, and the job tables of `copy_spans` over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.ops.copy_spans import copy_spans
from megatron_rl.reshard.exchange_schedule import Message
from megatron_rl.reshard.layout import Shard
from megatron_rl.reshard.lazy_tensor import LazyTensor, LazyTensorCache, Readable
from megatron_rl.reshard.offsets import Offset
from megatron_rl.reshard.plan import LocalCopy

SOURCE, TARGET = "source", "target"


class TensorGroup(NamedTuple):
    """Tensors that one `copy_spans` call can take together."""

    side: str
    dtype: torch.dtype


class TensorSlot(NamedTuple):
    """One local tensor: where it stands in its group, and its row length in elements."""

    group: TensorGroup
    number: int
    stride: int
    lazy: bool = False


class CopyCall(NamedTuple):
    """One `copy_spans` call; None stands for the message buffer."""

    src: TensorGroup | None
    dst: TensorGroup | None
    jobs: Tensor


class Binding:
    """Checks the tensors once and gives them numbers.

    Args:
        shards: side -> the shards of this rank there.
        tensors: side -> shard name -> local tensor, contiguous, of the shard's shape; those of the source side may be
            `LazyTensor`.

    Raises:
        ValueError: a tensor is missing, has another shape, is not contiguous, or lies on another device.
    """

    def __init__(self, shards: Mapping[str, Iterable[Shard]], tensors: Mapping[str, Mapping[str, Readable]]) -> None:
        self.groups: dict[TensorGroup, list[Tensor]] = {}  # of a lazy tensor: what it is like
        self._lazy: dict[TensorGroup, dict[int, LazyTensor]] = {}
        self._cache = LazyTensorCache()
        self._slots: dict[tuple[str, str], TensorSlot] = {}
        self.device: torch.device | None = None
        for side in (SOURCE, TARGET):
            for shard in shards[side]:
                if shard.spans:
                    self._add(side, shard, tensors[side])

    def _add(self, side: str, shard: Shard, tensors: Mapping[str, Readable]) -> None:
        if shard.name not in tensors:
            raise ValueError(f"{side} tensors lack {shard.name} {list(shard.shape)}: got {sorted(tensors)[:8]}...")
        given = tensors[shard.name]
        lazy = isinstance(given, LazyTensor)
        tensor = (given.like if isinstance(given, LazyTensor) else given).detach()
        if tuple(tensor.shape) != shard.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{side} tensor {shard.name}: expected a contiguous tensor of {list(shard.shape)}, got "
                f"{list(tensor.shape)} with strides {list(tensor.stride())}"
            )
        self.device = self.device or tensor.device
        if tensor.device != self.device:
            raise ValueError(f"{side} tensor {shard.name} is on {tensor.device}, the others on {self.device}")
        group = self.groups.setdefault(TensorGroup(side, tensor.dtype), [])
        slot = TensorSlot(TensorGroup(side, tensor.dtype), len(group), shard.matrix_shape[1], lazy)
        if isinstance(given, LazyTensor):
            self._lazy.setdefault(slot.group, {})[slot.number] = given
        group.append(tensor)
        self._slots[side, shard.name] = slot

    @property
    def signature(self) -> tuple[tuple[tuple[str, str], TensorSlot], ...]:
        """Equal for two bindings exactly when the same job tables serve both."""
        return tuple(self._slots.items())

    def slot(self, side: str, shard: str) -> TensorSlot:
        return self._slots[side, shard]

    def in_place(self, side: str, message: Message) -> Tensor | None:
        """The part of a local tensor that is, bit for bit, the message; None where packing is needed, as it is for
        a lazy tensor: a message under way would keep it."""
        if len(message.pieces) != 1:
            return None
        piece = message.pieces[0]
        slot = self.slot(TARGET if piece.forwarded else side, piece.offset.shard)
        if slot.lazy or slot.group.dtype != message.dtype or (piece.rows > 1 and piece.cols != slot.stride):
            return None
        start = piece.offset.row * slot.stride + piece.offset.col
        return self.groups[slot.group][slot.number].view(-1)[start : start + piece.numel]

    def packing(self, message: Message) -> list[CopyCall]:
        """Calls that fill the message from source shards and, for what is passed on, from target shards."""
        jobs: dict[TensorGroup, list[list[int]]] = {}
        for piece in message.pieces:
            slot = self.slot(TARGET if piece.forwarded else SOURCE, piece.offset.shard)
            begin = piece.offset.row * slot.stride + piece.offset.col
            row = [slot.number, 0, begin, piece.start, piece.rows, piece.cols, slot.stride, piece.cols]
            jobs.setdefault(slot.group, []).append(row)
        return [CopyCall(group, None, torch.tensor(rows)) for group, rows in jobs.items()]

    def unpacking(self, message: Message) -> list[CopyCall]:
        """Calls that lay the message out in target shards."""
        jobs: dict[TensorGroup, list[list[int]]] = {}
        for piece in message.pieces:
            slot = self.slot(TARGET, piece.offset.shard)
            begin = piece.offset.row * slot.stride + piece.offset.col
            row = [0, slot.number, piece.start, begin, piece.rows, piece.cols, piece.cols, slot.stride]
            jobs.setdefault(slot.group, []).append(row)
        return [CopyCall(None, group, torch.tensor(rows)) for group, rows in jobs.items()]

    def copying(self, side: str, copies: Iterable[LocalCopy]) -> list[CopyCall]:
        """Calls that copy from shards of ``side`` to target shards."""
        jobs: dict[tuple[TensorGroup, TensorGroup], list[list[int]]] = {}
        for copy in copies:
            src, dst = self.slot(side, copy.src.shard), self.slot(TARGET, copy.dst.shard)
            begin, end = _start(copy.src, src), _start(copy.dst, dst)
            shape = (copy.rectangle.num_rows, copy.rectangle.num_cols)
            row = [src.number, dst.number, begin, end, *shape, src.stride, dst.stride]
            jobs.setdefault((src.group, dst.group), []).append(row)
        return [CopyCall(src, dst, torch.tensor(rows)) for (src, dst), rows in jobs.items()]

    def run(self, calls: Iterable[CopyCall], buffer: Tensor | None = None, check: bool = False) -> None:
        """``check``: let `copy_spans` check the tables, as is done when they are new."""
        packed = [] if buffer is None else [buffer]
        for call in calls:
            destinations = packed if call.dst is None else self.groups[call.dst]
            for sources, jobs in [(packed, call.jobs)] if call.src is None else self._read(call.src, call.jobs):
                copy_spans(sources, destinations, jobs, checked=check)

    def _read(self, group: TensorGroup, jobs: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
        """The jobs with the tensors that they read; lazy ones one by one."""
        lazy = self._lazy.get(group)
        if not lazy:
            yield self.groups[group], jobs
            return
        numbers = jobs[:, 0]
        computed = torch.isin(numbers, torch.tensor(list(lazy)))
        if not computed.all():
            yield self.groups[group], jobs[~computed]
        for number in numbers[computed].unique().tolist():
            own = jobs[numbers == number]
            own[:, 0] = 0
            yield [self._cache.read((group, number), lazy[number])], own

    def release(self) -> None:
        """Drop lazy tensors that are kept for the next call."""
        self._cache.clear()


def _start(offset: Offset, slot: TensorSlot) -> int:
    return offset.row * slot.stride + offset.col
