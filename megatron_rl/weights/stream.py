"""`BucketStream`: a push into an engine in another process, bucket by bucket, under one limit on extra memory.

    for each bucket: transfer -> attest -> write        the next bucket travels while the engine reads the last

A quarter of the limit is for messages under way; a bucket is written from one of two buffers. A bucket that is larger
than a buffer, because a single shard is, has the memory to itself; where even that passes the limit, a warning says so.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from megatron_rl.reshard import Layout, Readable, Resharder, Shard, TransferReport, WireFormat
from megatron_rl.reshard.buckets import cut_buckets, shard_bytes, shard_dtype
from megatron_rl.weights.attestation import Attestor
from megatron_rl.weights.diagnosis import AttestationError, faults
from megatron_rl.weights.target import WeightTarget

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MESSAGE_SHARE = 4  # one part in so many of the limit is for messages under way


@dataclass(slots=True)
class StreamReport:
    """One run, on one rank. Written by `BucketStream.run`."""

    transfer: TransferReport | None = None
    write_s: float = 0.0  # seconds spent waiting for the engine
    attest_s: float = 0.0
    peak_bytes: int = 0  # buffers of buckets and of messages, counted as they are allocated
    unverified: str = ""  # why the engine could not prove that it holds the weights
    error: Exception | None = None  # the bucket that could not be attested or written; the rest was transferred only
    engine_failed: bool = False  # the error is the engine's

    @property
    def may_retry(self) -> bool:
        """Whether nothing that failed on this rank would fail again in another attempt."""
        return self.error is None or self.engine_failed


class BucketStream:
    """One rank's part.

    Args:
        target: takes the buckets; `WeightTarget.streams`.
        resharder: of the whole transfer, made with `message_bytes` of the limit.
        max_bytes: limit on extra memory of this rank.
        attestor: compares what arrived; None = nothing does.
    """

    def __init__(
        self, target: WeightTarget, rank: int, resharder: Resharder, max_bytes: int, attestor: Attestor | None
    ) -> None:
        layout, wire = target.layout, resharder.wire
        self._target, self._rank, self._wire, self._resharder = target, rank, wire, resharder
        self._takes_part = rank in layout.replica_of
        spare = max_bytes - message_bytes(max_bytes)
        self.limit = spare // target.bucket_copies
        self.buckets = cut_buckets(layout, wire, self.limit)
        self._resharders = resharder.split(self.buckets)
        self._attestors = attestor.split(self.buckets) if attestor is not None else None
        held = layout.shards(rank)
        self._shards = [[shard for shard in held if shard.name in bucket.shards] for bucket in self.buckets]
        sizes = [sum(shard_bytes(shard, wire) for shard in shards) for shards in self._shards]
        fitting = (size for size, bucket in zip(sizes, self.buckets, strict=True) if bucket.num_bytes <= self.limit)
        self._room = max(fitting, default=0)
        self._check_limit(layout, spare, max_bytes)

    def _check_limit(self, layout: Layout, spare: int, max_bytes: int) -> None:
        alone = [bucket for bucket in self.buckets if bucket.num_bytes > self.limit]
        self.num_oversized = sum(bucket.num_bytes * (self._target.bucket_copies - 1) > spare for bucket in alone)
        logger.info("weights: %d buckets of up to %d bytes for %s", len(self.buckets), self.limit, layout.name)
        if self.num_oversized and self._rank == min(layout.replica_of):
            largest = max(alone, key=lambda bucket: bucket.num_bytes)
            logger.warning(
                "%d of %d buckets pass max_staging_bytes=%d: the engine takes whole shards, and %s needs %d bytes on a "
                "rank (raise max_staging_bytes, or actor.rollout.tp)",
                self.num_oversized,
                len(self.buckets),
                max_bytes,
                min(largest.shards),
                largest.num_bytes,
            )

    def run(
        self, tensors: Mapping[str, Readable], expected: Tensor | None, previous: Tensor | None, device: torch.device
    ) -> StreamReport:
        """Transfer all buckets, and write them as long as nothing fails. Collective.

        Args:
            expected: the checksums that all ranks agree on; None = nothing is compared.
            previous: those of the last push, to explain a fault with.

        Raises:
            TransportError: another rank is gone.
        """
        report, pool, buffers = StreamReport(), self._resharder.make_pool(device), self._buffers(device)
        for number, bucket in enumerate(self.buckets):
            alone = bucket.num_bytes > self.limit
            if alone:  # the engine must have read the buffers before their memory is freed
                self._engine(report, self._target.write_shards, {})
                buffers.clear()
            held = buffers.take(self._shards[number], self._wire)
            moved = self._resharders[number].bind(tensors, held, pool)()
            report.transfer = moved if report.transfer is None else _sum(report.transfer, moved)
            elsewhere = bucket.num_bytes * (self._target.bucket_copies - 2)
            report.peak_bytes = max(report.peak_bytes, buffers.num_bytes + pool.allocated_bytes + elsewhere)
            self._attest_and_write(report, number, held, expected, previous)
            if alone:
                self._engine(report, self._target.write_shards, {})
                buffers.clear()
        report.unverified = self._engine(report, self._target.finish_update) or ""
        return report

    def _buffers(self, device: torch.device) -> _Buffers:
        return _Buffers(self._room, functools.partial(self._target.new_buffer, device=device))

    def _attest_and_write(
        self,
        report: StreamReport,
        number: int,
        held: Mapping[str, Tensor],
        expected: Tensor | None,
        previous: Tensor | None,
    ) -> None:
        """Attest a bucket and write it. A fault is passed to all ranks of the engine, and nothing more is written."""
        fault, start = None, time.perf_counter()
        if self._attestors is not None and expected is not None and report.error is None:
            found = faults(self._attestors[number], held, expected, previous)
            fault = AttestationError(self._rank, found) if found else None
        report.attest_s += time.perf_counter() - start
        self._engine(report, self._target.write_shards, held, str(fault) if fault else "")
        if fault is not None:
            report.error, report.engine_failed = fault, False

    def _engine(self, report: StreamReport, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call the engine, unless something failed before; keep its error."""
        if report.error is not None or not self._takes_part:
            return None
        start = time.perf_counter()
        try:
            return action(*args, **kwargs)
        except Exception as error:
            report.error, report.engine_failed = error, isinstance(error, RuntimeError)
            return None
        finally:
            report.write_s += time.perf_counter() - start


class _Buffers:
    """The memory of the buckets that are under way: two equal buffers in turn, or one of a larger bucket."""

    def __init__(self, room: int, new: Callable[[int], Tensor]) -> None:
        self._room, self._new = room, new
        self._turns: deque[Tensor] = deque()

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._turns)

    def take(self, shards: Sequence[Shard], wire: WireFormat) -> dict[str, Tensor]:
        """Memory for the shards of the next bucket; that of the bucket before the last is used again."""
        if not shards:
            return {}
        sizes = [shard_bytes(shard, wire) for shard in shards]
        if len(self._turns) < 2:
            room = max(sum(sizes), self._room if sum(sizes) <= self._room else 0)
            self._turns.append(self._new(room))
        else:
            self._turns.rotate()
        parts, held = self._turns[-1][: sum(sizes)].split(sizes), {}
        for shard, part in zip(shards, parts, strict=True):
            dtype = shard_dtype(shard, wire)
            held[shard.name] = part[: math.prod(shard.shape) * dtype.itemsize].view(dtype).view(shard.shape)
            if sum(span.numel for span in shard.spans) < held[shard.name].numel():
                held[shard.name].zero_()  # nothing else writes its padding
        return held

    def clear(self) -> None:
        self._turns.clear()


def message_bytes(max_bytes: int) -> int:
    """The part of a limit that messages under way may take."""
    return max_bytes // MESSAGE_SHARE


def _sum(one: TransferReport, two: TransferReport) -> TransferReport:
    added = ("sent_bytes", "received_bytes", "in_place_bytes", "local_elements", "num_exchanges", "seconds")
    values = {name: getattr(one, name) + getattr(two, name) for name in added}
    return replace(one, peak_staging_bytes=max(one.peak_staging_bytes, two.peak_staging_bytes), **values)
