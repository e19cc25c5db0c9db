"""`Resharder`: runs one rank's part of a plan, any number of times, under a limit on extra memory.

Packing, transfers and unpacking of neighbouring exchanges overlap as far as the staging limit allows; local copies run
while the first messages are under way. Nothing but weights is ever sent: both ends know what each message holds.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy as shallow_copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.reshard.binding import SOURCE, TARGET, Binding, CopyCall
from megatron_rl.reshard.buckets import Bucket, split_plan
from megatron_rl.reshard.exchange_schedule import Chunking, Exchange, Message, build_schedule, messages
from megatron_rl.reshard.layout import Layout, Shard
from megatron_rl.reshard.lazy_tensor import Readable
from megatron_rl.reshard.plan import LocalCopy, RankPlan, ReshardPlan
from megatron_rl.reshard.staging import StagingPool
from megatron_rl.reshard.topology import Topology
from megatron_rl.reshard.transport import Pending, Transport
from megatron_rl.reshard.wire_format import WireFormat

DEFAULT_STAGING_BYTES = 64 << 20
MAX_CHUNK_BYTES = 8 << 20  # a message costs its ends about 0.3 ms of processor time, whatever its size
MIN_EPOCH = 1 << 16  # elements a target rank receives in a round of a plan that passes pieces on
MAX_IN_FLIGHT = 4  # exchanges under way at once: enough to hide packing and unpacking behind a transfer
ALIGNMENT = 8


@dataclass(frozen=True)
class TransferReport:
    """What one run of `Resharder` did on one rank. Written by `Resharder.run`; bytes are counted as they are posted."""

    rank: int
    sent_bytes: int
    received_bytes: int
    in_place_bytes: int  # of those sent and received, the ones that needed no staging buffer
    local_elements: int  # copied inside the rank
    peak_staging_bytes: int
    num_exchanges: int
    seconds: float  # until the host was done; on an accelerator queued copies may still run

    def __str__(self) -> str:
        return (
            f"rank {self.rank}: sent {self.sent_bytes:,} B, received {self.received_bytes:,} B in "
            f"{self.num_exchanges} exchanges, copied {self.local_elements:,} elements locally, staging "
            f"{self.peak_staging_bytes:,} B, {self.seconds:.3f} s"
        )


class Resharder:
    """Carries local tensors of layout ``source`` into local tensors of layout ``target``, on one rank.

    Args:
        source, target, topology: see `ReshardPlan`; equal on all ranks.
        rank: this rank, as the layouts number ranks.
        transport: reaches every rank that this one exchanges with; `LocalTransport` when there is none.
        wire_dtype: dtype in which values travel (and through which local copies are rounded too, so that all replicas
            get equal bits); a `WireFormat` to except some tensors. Equal on all ranks.
        max_staging_bytes: limit on extra memory, at least two 8-byte buffers. Equal on all ranks.
        plan: an existing plan of these layouts, to share its indexes; None makes one.
    """

    def __init__(
        self,
        source: Layout,
        target: Layout,
        rank: int,
        transport: Transport,
        wire_dtype: torch.dtype | WireFormat = torch.bfloat16,
        max_staging_bytes: int = DEFAULT_STAGING_BYTES,
        topology: Topology | None = None,
        plan: ReshardPlan | None = None,
    ) -> None:
        if max_staging_bytes < 2 * ALIGNMENT:
            raise ValueError(f"max_staging_bytes={max_staging_bytes}: expected at least {2 * ALIGNMENT} bytes")
        plan = plan or ReshardPlan(source, target, topology)
        self.wire = wire_dtype if isinstance(wire_dtype, WireFormat) else WireFormat(wire_dtype)
        self.rank, self.max_staging_bytes = rank, max_staging_bytes
        self.plan: RankPlan = plan.for_rank(rank)
        self._shards = {SOURCE: source.shards(rank), TARGET: target.shards(rank)}
        self._transport, self._ranks = transport, plan.ranks
        self._chunking = make_chunking(plan, self.wire, max_staging_bytes)
        self._signature: tuple | None = None
        self._program: _Program | None = None

    @functools.cached_property
    def _schedule(self) -> tuple[Exchange, ...]:
        return build_schedule(self.plan, self._ranks, self.wire, self._chunking)

    def split(self, buckets: Sequence[Bucket]) -> list[Resharder]:
        """One resharder for each bucket of the target, to be run in their order by all ranks. What they do together is
        what this one does: each byte has the same sender."""
        shards_of: dict[str, dict[str, Shard]] = {}
        for shard in self._shards[SOURCE]:
            for span in shard.spans:
                shards_of.setdefault(span.tensor, {})[shard.name] = shard
        parts = []
        for bucket, plan in zip(buckets, split_plan(self.plan, buckets), strict=True):
            part = shallow_copy(self)
            part.__dict__.pop("_schedule", None)
            sources = {n: s for tensor in bucket.tensors for n, s in shards_of.get(tensor, {}).items()}
            targets = tuple(shard for shard in self._shards[TARGET] if shard.name in bucket.shards)
            part.plan, part._shards = plan, {SOURCE: tuple(sources.values()), TARGET: targets}
            parts.append(part)
        return parts

    def check(self, source_tensors: Mapping[str, Readable]) -> None:
        """Raise ValueError unless ``source_tensors`` fit the source layout."""
        Binding({SOURCE: self._shards[SOURCE], TARGET: ()}, {SOURCE: source_tensors, TARGET: {}})

    def make_pool(self, device: torch.device) -> StagingPool:
        """Buffers that several resharders of one `split` may use one after the other."""
        largest = max(self._chunking.chunk_bytes, self.wire.widest)
        return StagingPool(-(-largest // ALIGNMENT) * ALIGNMENT, self.max_staging_bytes, device)

    def run(self, source_tensors: Mapping[str, Readable], target_tensors: Mapping[str, Tensor]) -> TransferReport:
        """Fill ``target_tensors`` from ``source_tensors`` (shard name -> this rank's contiguous tensor;
        a source may be `LazyTensor`).

        Collective: every rank of the plan must call it. Padding, that is elements of the target under no span, is left
        as it is: zero it once, when the tensors are allocated. Source and target must not share memory.

        Raises:
            ValueError: tensors that do not fit the layouts.
            TransportError: another rank failed or did not come; the target tensors are then in an undefined state.
        """
        return self.bind(source_tensors, target_tensors)()

    def bind(
        self,
        source_tensors: Mapping[str, Readable],
        target_tensors: Mapping[str, Tensor],
        pool: StagingPool | None = None,
    ) -> Callable[[], TransferReport]:
        """What `run` does before it needs another rank: check the tensors. Call the result to run.

        Args:
            pool: from `make_pool`; None = buffers of its own.

        Raises:
            ValueError: tensors that do not fit the layouts.
        """
        binding = Binding(self._shards, {SOURCE: source_tensors, TARGET: target_tensors})
        fresh = binding.signature != self._signature
        if self._program is None or fresh:
            self._program = _compile(self.plan, self._schedule, binding, self.wire, self._chunking)
            self._signature = binding.signature
        device = binding.device or torch.device("cpu")
        pool = pool or StagingPool(self._program.buffer_bytes, self.max_staging_bytes, device)
        return functools.partial(_Run(self._program, binding, self._transport, pool, check=fresh).run, self.plan)


def make_chunking(plan: ReshardPlan, wire: WireFormat, max_staging_bytes: int) -> Chunking:
    """Chunks of which two exchanges in both directions fit under the limit; rounds short enough that the last replica
    of a chain waits about half a full transfer longer than the first."""
    chunk = max(min(max_staging_bytes // 4, MAX_CHUNK_BYTES) // ALIGNMENT * ALIGNMENT, ALIGNMENT)
    groups = plan.target.replicas
    total = max(plan.source_index.num_elements, 1)
    replicas = max((len(ranks) for ranks in groups.values()), default=1)
    if replicas == 1:
        return Chunking(chunk, total)
    per_rank = chunk // wire.widest
    shortest = min(MIN_EPOCH, per_rank) * len(groups)
    return Chunking(chunk, max(min(4 * per_rank * len(groups), total // (2 * replicas)), shortest, 1))


class _ExchangeStep(NamedTuple):
    """An exchange with the calls that pack and unpack it; None where the message lies in a local tensor as it is."""

    exchange: Exchange
    packing: list[CopyCall] | None
    unpacking: list[CopyCall] | None

    @property
    def num_buffers(self) -> int:
        return (self.packing is not None) + (self.unpacking is not None)


class _Program(NamedTuple):
    """Job tables for everything that one rank does; built once and replayed."""

    steps: list[_ExchangeStep]
    copies: list[CopyCall]
    rounded: list[tuple[Message, list[CopyCall], list[CopyCall]]]  # local copies that pass through the wire dtype
    duplicates: list[CopyCall]
    buffer_bytes: int


def _compile(
    plan: RankPlan, schedule: Iterable[Exchange], binding: Binding, wire: WireFormat, chunking: Chunking
) -> _Program:
    steps = []
    for exchange in schedule:
        send, receive = exchange.send, exchange.receive
        pack = binding.packing(send) if send and binding.in_place(SOURCE, send) is None else None
        unpack = binding.unpacking(receive) if receive and binding.in_place(TARGET, receive) is None else None
        steps.append(_ExchangeStep(exchange, pack, unpack))
    direct = [copy for copy in plan.copies if not _rounds(copy, binding, wire)]
    rounded = list(_rounded([copy for copy in plan.copies if _rounds(copy, binding, wire)], binding, wire, chunking))
    sizes = [step.exchange.send.num_bytes for step in steps if step.exchange.send and step.packing is not None]
    sizes += [step.exchange.receive.num_bytes for step in steps if step.exchange.receive and step.unpacking is not None]
    sizes += [message.num_bytes for message, _, _ in rounded]
    buffer_bytes = -(-max(sizes, default=0) // ALIGNMENT) * ALIGNMENT
    duplicates = binding.copying(TARGET, plan.duplicates)
    return _Program(steps, binding.copying(SOURCE, direct), rounded, duplicates, buffer_bytes)


def _rounds(copy: LocalCopy, binding: Binding, wire: WireFormat) -> bool:
    """Whether a direct copy could keep bits that the wire would have rounded away."""
    have, want = (binding.slot(*end).group.dtype for end in ((SOURCE, copy.src.shard), (TARGET, copy.dst.shard)))
    through = wire.of(copy.tensor)
    return through not in (have, want) and through != torch.float32


def _rounded(
    copies: list[LocalCopy], binding: Binding, wire: WireFormat, chunking: Chunking
) -> Iterable[tuple[Message, list[CopyCall], list[CopyCall]]]:
    for dtype in sorted({wire.of(copy.tensor) for copy in copies}, key=str):
        mine = [copy for copy in copies if wire.of(copy.tensor) == dtype]
        shapes = [(copy.rectangle.num_rows, copy.rectangle.num_cols) for copy in mine]
        ends = [
            messages(dtype, ((offset, False, *shape) for offset, shape in zip(offsets, shapes, strict=True)), chunking)
            for offsets in ([copy.src for copy in mine], [copy.dst for copy in mine])
        ]
        for out, into in zip(*ends, strict=True):
            yield out, binding.packing(out), binding.unpacking(into)


class _InFlight(NamedTuple):
    """A step under way, with the staging buffers it holds."""

    step: _ExchangeStep
    pending: Pending
    sending: Tensor | None
    receiving: Tensor | None


class _Run:
    """One replay of a program: exchanges are posted and completed in the order of the schedule."""

    def __init__(
        self, program: _Program, binding: Binding, transport: Transport, pool: StagingPool, check: bool
    ) -> None:
        self._program, self._binding, self._transport, self._check = program, binding, transport, check
        self._pool = pool
        self._in_flight: deque[_InFlight] = deque()
        self._local_done = False
        self._sent = self._received = self._in_place = 0

    def run(self, plan: RankPlan) -> TransferReport:
        start = time.perf_counter()
        for step in self._program.steps:
            self._post(step)
        while self._in_flight or not self._local_done:
            self._advance()
        self._call(self._program.duplicates)
        self._binding.release()
        return TransferReport(
            rank=plan.rank,
            sent_bytes=self._sent,
            received_bytes=self._received,
            in_place_bytes=self._in_place,
            local_elements=plan.copied_elements,
            peak_staging_bytes=self._pool.allocated_bytes,
            num_exchanges=len(self._program.steps),
            seconds=time.perf_counter() - start,
        )

    def _post(self, step: _ExchangeStep) -> None:
        exchange = step.exchange
        if exchange.forwards:  # what is passed on must have arrived: it did so in an earlier round
            while self._in_flight and self._in_flight[0].step.exchange.round < exchange.round:
                self._advance()
        while len(self._in_flight) >= MAX_IN_FLIGHT or not self._pool.available(step.num_buffers):
            self._advance()
        sending = self._pool.take() if step.packing is not None else None
        receiving = self._pool.take() if step.unpacking is not None else None
        out = self._outgoing(exchange.send, step.packing, sending) if exchange.send else None
        into = self._view(exchange.receive, receiving) if exchange.receive else None
        pending = self._transport.exchange(exchange.peer, out, into)
        self._in_flight.append(_InFlight(step, pending, sending, receiving))

    def _outgoing(self, message: Message, packing: list[CopyCall] | None, buffer: Tensor | None) -> Tensor:
        view = self._view(message, buffer, SOURCE)
        if packing is not None:
            self._call(packing, view)
        self._sent += message.num_bytes
        return view

    def _view(self, message: Message, buffer: Tensor | None, side: str = TARGET) -> Tensor:
        """The message's values: the beginning of its buffer, or where they lie in a local tensor."""
        if buffer is not None:
            return buffer[: message.num_bytes].view(message.dtype)
        view = self._binding.in_place(side, message)
        assert view is not None
        self._in_place += message.num_bytes
        return view

    def _advance(self) -> None:
        """Called where this rank can only wait: use the time for local copies, once, or else do wait."""
        if self._local_done:
            self._complete()
        else:
            self._local_done = True
            self._copy_locally()

    def _complete(self) -> None:
        step, pending, sending, receiving = self._in_flight.popleft()
        pending.wait()
        message = step.exchange.receive
        if message is not None:
            self._received += message.num_bytes
            if step.unpacking is not None and receiving is not None:
                self._call(step.unpacking, receiving[: message.num_bytes].view(message.dtype))
        for buffer in (sending, receiving):
            if buffer is not None:
                self._pool.give(buffer)

    def _copy_locally(self) -> None:
        self._call(self._program.copies)
        for message, packing, unpacking in self._program.rounded:
            while not self._pool.available(1):
                self._complete()
            buffer = self._pool.take()
            view = buffer[: message.num_bytes].view(message.dtype)
            self._call(packing, view)
            self._call(unpacking, view)
            self._pool.give(buffer)

    def _call(self, calls: list[CopyCall], buffer: Tensor | None = None) -> None:
        self._binding.run(calls, buffer, self._check)
