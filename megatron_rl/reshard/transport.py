"""Transports: how one packed buffer gets from one rank to another. Bounded waits, errors that name the peer."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel.agreement import Alone, GroupPeers, Peers, TransportError
from megatron_rl.parallel.groups import world_group
from megatron_rl.reshard.transport_node import MIN_BYTES, MemoryRead, Neighbours

TIMEOUT = 600.0  # seconds


class Pending(ABC):
    """An exchange under way."""

    @abstractmethod
    def wait(self) -> None:
        """Return when the sent buffer may be reused and the received one read by work on the current stream.

        Raises:
            TransportError: the peer failed or did not answer in time.
        """


class Transport(ABC):
    """Moves flat contiguous buffers. Exchanges between two ranks match in the order in which each posts them."""

    @abstractmethod
    def exchange(self, peer: int, send: Tensor | None, receive: Tensor | None) -> Pending:
        """Begin to send ``send`` to ``peer`` and to receive ``receive`` from it; either may be None. Both buffers must
        stay alive and untouched until the wait returns."""

    @abstractmethod
    def peers(self, ranks: Sequence[int], rank: int, device: torch.device | str = "cpu") -> Peers:
        """All ``ranks`` of a plan, seen from ``rank``, for what they agree on; each of them asks for it.

        Args:
            device: of the tensors that the backend takes.

        Raises:
            TransportError: the transport joins other ranks.
        """


class LocalTransport(Transport):
    """For plans that move nothing between ranks: one process, or a source that lies where the target does."""

    def exchange(self, peer: int, send: Tensor | None, receive: Tensor | None) -> Pending:
        raise TransportError(
            f"this plan exchanges data with rank {peer}, but its transport is local only: pass a P2PTransport"
        )

    def peers(self, ranks: Sequence[int], rank: int, device: torch.device | str = "cpu") -> Peers:
        if list(ranks) != [rank]:
            raise TransportError(f"ranks {list(ranks)} are to agree, but their transport is local only")
        return Alone(rank)


class P2PTransport(Transport):
    """Batched point-to-point messages of torch.distributed, over gloo or NCCL. With NCCL, making one is collective.
    Large buffers of CPU memory are read by ranks of the same machine, without a message (`transport_node`).

    Args:
        group: must contain every rank of the plan; ranks are global. None: the default group.
        timeout: seconds that one exchange may take.
        store, rank: of ``group``, where it spans more than this process's world.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        timeout: float = TIMEOUT,
        store: dist.Store | None = None,
        rank: int | None = None,
    ) -> None:
        self._group, self._timeout = group, timeout
        if "nccl" in dist.get_backend(group):
            # NCCL's first batch of messages would otherwise have to involve every rank of the group.
            dist.barrier(group)
        store = store or dist.distributed_c10d._get_default_store()
        self._neighbours = Neighbours(store, dist.get_rank() if rank is None else rank)

    def exchange(self, peer: int, send: Tensor | None, receive: Tensor | None) -> Pending:
        buffers = [None if buffer is None else _as_bytes(buffer) for buffer in (send, receive)]
        try:
            read = [buffer if self._is_read(buffer, peer) else None for buffer in buffers]
            reading = MemoryRead(peer, self._group, *read) if any(buffer is not None for buffer in read) else None
            operations = [
                dist.P2POp(operation, buffer, peer, self._group)
                for operation, buffer, without in zip((dist.isend, dist.irecv), buffers, read, strict=True)
                if buffer is not None and without is None
            ]
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise TransportError(f"could not start an exchange with rank {peer}: {error}") from error
        blocking = any(buffer is not None and buffer.device.type == "cpu" for buffer in buffers)
        return _P2PPending(works, reading, peer, self._timeout, blocking)

    def _is_read(self, buffer: Tensor | None, peer: int) -> bool:
        large = buffer is not None and buffer.device.type == "cpu" and buffer.nbytes >= MIN_BYTES
        return large and self._neighbours.near(peer)

    def peers(self, ranks: Sequence[int], rank: int, device: torch.device | str = "cpu") -> Peers:
        found = GroupPeers(self._group or world_group(), device, self._timeout)
        if sorted(ranks) != sorted(found.ranks):
            raise TransportError(f"ranks {sorted(ranks)} are to agree, but their group has {list(found.ranks)}")
        return found


class _P2PPending(Pending):
    def __init__(
        self, works: list[dist.Work], reading: MemoryRead | None, peer: int, timeout: float, blocking: bool
    ) -> None:
        self._works, self._reading, self._peer = works, reading, peer
        self._timeout, self._blocking = timeout, blocking

    def wait(self) -> None:
        try:
            if self._reading is not None:
                self._works += self._reading.works(self._wait)
            for work in self._works:
                self._wait(work)
        except RuntimeError as error:
            raise TransportError(
                f"the exchange with rank {self._peer} failed or took longer than {self._timeout} s: {error}"
            ) from error

    def _wait(self, work: dist.Work) -> None:
        if self._blocking:
            work.wait(timedelta(seconds=self._timeout))
        else:  # NCCL: only the stream waits; the process group's own watchdog bounds it
            work.wait()


def _as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat byte tensor: no backend then needs to know its dtype.

    gloo silently sends wrong values from non-contiguous memory; `Tensor.view` refuses it.
    """
    return tensor.detach().view(-1).view(torch.uint8)


class MemoryHub:
    """Connects `MemoryTransport`s of several ranks that run as threads of one process."""

    def __init__(self, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._links: dict[tuple[int, int], queue.Queue[_PostedSend]] = defaultdict(queue.Queue)

    def transport(self, rank: int) -> MemoryTransport:
        return MemoryTransport(self, rank)

    def link(self, src: int, dst: int) -> queue.Queue[_PostedSend]:
        with self._lock:
            return self._links[src, dst]


class _PostedSend:
    """A posted send; it counts as sent only once its receiver has copied it, as with a rendezvous protocol."""

    def __init__(self, content: Tensor) -> None:
        self.content = content
        self.taken = threading.Event()


class MemoryTransport(Transport):
    """Ranks as threads of one process: to run a whole job in memory, without process groups."""

    def __init__(self, hub: MemoryHub, rank: int) -> None:
        self._hub, self.rank = hub, rank

    def exchange(self, peer: int, send: Tensor | None, receive: Tensor | None) -> Pending:
        posted = None
        if send is not None:
            posted = _PostedSend(_as_bytes(send))
            self._hub.link(self.rank, peer).put(posted)
        inbox = self._hub.link(peer, self.rank)
        return _MemoryPending(posted, receive, inbox, peer, self._hub.timeout)

    def peers(self, ranks: Sequence[int], rank: int, device: torch.device | str = "cpu") -> Peers:
        return _MemoryPeers(self, ranks)


class _MemoryPeers(Peers):
    """Every rank sends to every other."""

    def __init__(self, transport: MemoryTransport, ranks: Sequence[int]) -> None:
        self.ranks = tuple(sorted(ranks))
        self._transport = transport

    def gather(self, value: Tensor) -> Tensor:
        own, me = value.contiguous(), self._transport.rank
        found = {rank: own if rank == me else torch.empty_like(own) for rank in self.ranks}
        for pending in [self._transport.exchange(peer, own, found[peer]) for peer in self.ranks if peer != me]:
            pending.wait()
        return torch.stack([found[rank] for rank in self.ranks])

    def total(self, value: Tensor) -> Tensor:
        return self.gather(value).sum(0, dtype=value.dtype)


class _MemoryPending(Pending):
    def __init__(
        self,
        posted: _PostedSend | None,
        receive: Tensor | None,
        inbox: queue.Queue[_PostedSend],
        peer: int,
        timeout: float,
    ) -> None:
        self._posted, self._receive, self._inbox, self._peer, self._timeout = posted, receive, inbox, peer, timeout

    def wait(self) -> None:
        if self._receive is not None:
            try:
                arrived = self._inbox.get(timeout=self._timeout)
            except queue.Empty:
                raise TransportError(f"nothing arrived from rank {self._peer} within {self._timeout} s") from None
            _as_bytes(self._receive).copy_(arrived.content)
            arrived.taken.set()
        if self._posted is not None and not self._posted.taken.wait(self._timeout):
            raise TransportError(f"rank {self._peer} did not take what was sent to it within {self._timeout} s")
