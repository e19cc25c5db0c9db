"""`WeightTransfer`: how weights reach a replica's servers. The engine pauses them before, and names the version after.

    open -> write, write, ... -> close        all ranks of the replica together; a failure on any is raised on all

A bucket is on its way into the servers when `write` returns, and has been read when the next `write` or `close` has.
Nothing counts as delivered before the servers' own checksums of their parameters are those of the shards.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.models import Architecture
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.parallel.agreement import Agreement, Alone, GroupPeers
from megatron_rl.parallel.groups import gather_objects
from megatron_rl.registry import Registry
from megatron_rl.reshard import Layout
from megatron_rl.reshard.buckets import shard_dtype
from megatron_rl.reshard.layout import Recomputed
from megatron_rl.rollout.sglang.event_loop import EventLoop
from megatron_rl.rollout.sglang.sglang_client import RequestError, ServerError, SGLangClient
from megatron_rl.rollout.sglang.weight_transfer.bucket_mailbox import RECEIVER
from megatron_rl.rollout.sglang.weight_transfer.checksums import server_checksum
from megatron_rl.rollout.sglang.weight_transfer.proof import Proof, RankSums, ServerSums, UsualLayout, prove
from megatron_rl.rollout.sglang.weight_transfer.wire import free_shared_memory, unshared_bytes

logger = logging.getLogger(__name__)

REQUEST_BYTES = 256 << 20
INLINE_BYTES = 16 << 20  # of a request whose tensors travel as text

T = TypeVar("T")
Post = Coroutine[Any, Any, object]


class _Ready(NamedTuple):
    """What each rank reports before a bucket is written."""

    fault: str  # why it must not be
    is_misuse: bool  # the fault is the caller's: nothing of this call was written
    new_bytes: int  # that would have to move to shared memory
    payload: Any  # what `prepare` gives, and so what need not be gathered by itself
    free_bytes: int  # there, as the first rank sees it; 0 = servers are on other machines


class WeightTransfer(ABC):
    """One rank's part; subclasses say in `send` how a bucket travels.

    Args:
        loop: runs the clients' coroutines, in a thread of its own.
        layout: the `rollout_layout` of ``architecture``; ``layout.shards(rank)`` are this rank's.
        dtype: of the servers' weights, but those that ``layout`` gives another one.
        tp_group: the replica's ranks, in the order of the servers' tensor-parallel ranks; None = this rank alone.
        device: where the group's backend takes tensors.
        bucket_bytes: of one request, on each rank; a larger shard goes alone.
        verify: compare the servers' checksums with those of the shards; one pass over all weights on either side.
    """

    needs_session = True  # the servers want /begin_weight_update before and /end_weight_update after
    runs_loader = False  # the model's own load_weights: it cuts and places whole tensors, and refreshes what it derives
    bucket_copies = 2  # see `RolloutEngine.bucket_copies`

    def __init__(
        self,
        *,
        loop: EventLoop,
        architecture: Architecture,
        layout: Layout,
        rank: int,
        dtype: torch.dtype,
        tp_group: dist.ProcessGroup | None,
        device: torch.device | str = "cpu",
        bucket_bytes: int = REQUEST_BYTES,
        verify: bool = True,
    ) -> None:
        self.loop, self.layout, self.rank, self.dtype, self.group = loop, layout, rank, dtype, tp_group
        self.bucket_bytes, self._verify = bucket_bytes, verify
        self.architecture = architecture
        self._usual = UsualLayout() if isinstance(architecture, ModuleArchitecture) else None
        self._recomputed: dict[str, list[Recomputed]] = {}  # by the shard that they are computed from
        for tensor in layout.recomputed:
            self._recomputed.setdefault(tensor.source, []).append(tensor)
        self._refuse_stale()
        self.ranks = [rank] if tp_group is None else dist.get_process_group_ranks(tp_group)
        self.agreement = Agreement(Alone(rank) if tp_group is None else GroupPeers(tp_group, device))
        self.shapes = {shard.name: shard.shape for shard in layout.shards(rank)}
        self._dtypes = {shard.name: shard_dtype(shard, layout.dtypes(dtype)) for shard in layout.shards(rank)}
        self._proofs: dict[str, Proof] = {}  # by url, on the first rank
        self._posting: Future[object] | None = None
        self._posting_error = ""  # of the first server that failed while it posts
        # Of the update under way:
        self.clients: Sequence[SGLangClient] = ()  # on the first rank; empty on the others
        self.num_servers, self.shared = 0, False  # shared: servers can map the memory of this process
        self.have_receiver = False  # all servers do; see `bucket_mailbox`
        self._devices: tuple[str, ...] = ()  # of the servers
        self._sums: dict[str, dict[str, str]] = {}  # device -> shard -> checksum

    def _refuse_stale(self) -> None:
        stale = [tensor.name for tensor in self.layout.recomputed if tensor.by_loader and not self.runs_loader]
        if stale:
            raise ConfigError(
                f"servers compute {len(stale)} tensors, first {stale[0]!r}, while their own loader reads the weights; "
                "shards that are written past it would leave them stale: choose actor.rollout.options.delivery=disk"
            )

    @property
    def leads(self) -> bool:
        return self.rank == self.ranks[0]

    def new_buffer(self, num_bytes: int, device: torch.device) -> Tensor:
        """Memory for shards, ``[num_bytes]`` uint8."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    # --- the update ------------------------------------------------------------------------------------------------

    def open(self, clients: Sequence[SGLangClient]) -> None:
        """Begin to write; what an earlier update left undone is dropped.

        Args:
            clients: the replica's paused servers on its first rank; empty on the others.

        Raises:
            RuntimeError: a server failed, on any rank.
        """
        self.drop()
        for client in clients:
            self._proofs.pop(client.url, None)
        self.clients = clients
        self.num_servers, self._devices, self.have_receiver = self.lead(self._begin)
        self._sums = {device: {} for device in self._devices}

    def write(self, shards: Mapping[str, Tensor], fault: str = "") -> None:
        """Put a bucket of this rank's shards, by SGLang's own names, into the servers; see `RolloutEngine`.

        Raises:
            ValueError: a shard is unknown, of another shape or dtype or comes twice, on any rank.
            RuntimeError: an earlier bucket failed, or there is a ``fault``, on any rank; servers may hold a mixture.
        """
        left = self.relay(shards, fault)
        if left is not None:
            self._write_apart(shards, left)
        for device in self._devices if self._verify else ():
            for name, tensor in shards.items():
                self._sums[device][name] = server_checksum(tensor, device)
                for other in self._recomputed.get(name, ()):
                    self._sums[device][other.name] = server_checksum(other.compute(tensor), device)
        self._written.update(shards)

    def _write_apart(self, shards: Mapping[str, Tensor], fault: str) -> None:
        """By requests of their own."""
        ready = self._gather_ready(shards, fault)
        needed = sum(one.new_bytes for one in ready) + (self.bucket_bytes if self.runs_loader else 0)
        shared = ready[0].free_bytes > needed
        if self.leads and not shared and shards and any(device == "cpu" for device in self._devices):
            logger.warning("servers are on other machines or /dev/shm is full: weights go as bytes, slowly")
        self.shared = shared
        if not shards:
            return
        payloads = [one.payload for one in ready]
        self.send(shards, payloads if shared and all(payload is not None for payload in payloads) else None)

    def close(self) -> str:
        """Return once every server of the replica provably holds all shards; or why that cannot be verified.

        Raises:
            ValueError: shards are missing, on any rank.
            RuntimeError: a bucket failed, or a server holds other weights, on any rank.
        """
        missing = sorted(self.shapes.keys() - self._written)
        fault = f"shards missing: {missing}" if missing else ""
        left = self.relay({})
        self._gather_ready({}, left or fault, is_misuse=bool(missing) and not left)
        sums = self.gather(self._sums)
        reasons = self.lead(lambda: self._finish(sums))
        self.drop()
        if self.leads and reasons:
            logger.warning("whether the servers hold the weights cannot be verified: %s", reasons)
        return reasons

    def drop(self) -> None:
        """The update under way, if any, is given up."""
        self.drop_relay()
        if self._posting is not None:
            self._posting.cancel()
        self._posting, self._written, self.shared = None, set[str](), False

    def proof(self, url: str) -> RankSums | None:
        """The checksums of a server right after the last update of it; None = it was not asked for them. On the
        replica's first rank only."""
        return self._proofs[url].sums if url in self._proofs else None

    def relay(self, shards: Mapping[str, Tensor], fault: str = "") -> str | None:
        """Put a bucket on its way within a request that is under way; all ranks of the replica together.

        Returns:
            None = it went; otherwise no such request is under way any more, and why nothing more may be written, if so.
        """
        return fault

    def drop_relay(self) -> None:  # noqa: B027  most have none
        """Give up a request that buckets are put into."""

    def prepare(self, shards: Mapping[str, Tensor]) -> Any:
        """What the first rank needs of this one to send a bucket that servers can map already; None = it is gathered
        as it is sent."""
        return None

    @abstractmethod
    def send(self, shards: Mapping[str, Tensor], prepared: Sequence[Any] | None) -> None:
        """Put a bucket on its way (`post`); all ranks of the replica together.

        Args:
            prepared: by `prepare` of all ranks.
        """

    async def complete(self, client: SGLangClient) -> None:  # noqa: B027  most have nothing left to do
        """After the last bucket."""

    # --- the ranks of the replica ----------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Each rank's value, in the order of the servers' tensor-parallel ranks; on the first rank only."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * len(self.ranks) if self.leads else None
        dist.gather_object(value, values, dst=self.ranks[0], group=self.group)
        return values or []

    def lead(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on the first rank, which alone calls it; on every rank.

        Raises:
            RuntimeError: it failed; on every rank.
        """
        results: list[Any] = [None]

        def act() -> None:
            try:
                results[0] = action()
            except Exception as error:  # of one type on every rank: a push is retried by all of them or none
                raise RuntimeError(f"weights were not delivered: {type(error).__name__}: {error}") from error

        with self.agreement.attempt("writing weights to the servers") as attempt:
            if self.leads:
                attempt.run(act)
        if self.group is not None:
            dist.broadcast_object_list(results, src=self.ranks[0], group=self.group)
        return results[0]

    def post(self, action: Callable[[SGLangClient], Post]) -> None:
        """On the first rank: begin ``action`` on all servers at once, beside what this thread does next."""
        if self.leads:
            self._posting_error = ""
            self._posting = self.loop.submit(_each(self.clients, lambda client: self._noting(action(client))))

    async def _noting(self, posting: Post) -> None:
        """`_each` ends when all servers have answered, and others may be waiting for our next bucket."""
        try:
            await posting
        except Exception as error:
            self._posting_error = f"{type(error).__name__}: {error}"
            raise

    def each(self, action: Callable[[SGLangClient], Post]) -> None:
        """``action`` on all servers at once, to its end."""
        self.loop.run(_each(self.clients, action))

    def posting_failure(self) -> str:
        """Why the request under way takes no more buckets, on the first rank; "" = it does."""
        ended = self._posting is not None and self._posting.done()
        return self._posting_error or ("the request ended before its update" if ended else "")

    def _gather_ready(self, shards: Mapping[str, Tensor], fault: str, is_misuse: bool = False) -> list[_Ready]:
        """What all ranks report, once servers have read the previous bucket; raises their faults. Reports carry data
        that the first rank needs, so there is no vote beside them: it would double the exchanges of a bucket."""
        if not fault and shards:
            fault = self.misuse(shards)
            is_misuse = bool(fault)
        free = 0
        if self.leads:
            failure = self._settle()
            fault, is_misuse = failure or fault, is_misuse and not failure
            here = all(_is_here(client.url) for client in self.clients)
            free = free_shared_memory() if here else 0
        new_bytes = unshared_bytes(shards.values())
        # The first bucket of an update finds out whether servers can map memory of this process at all.
        payload = self.prepare(shards) if shards and self.shared and not fault and not new_bytes else None
        mine = _Ready(fault and f"rank {self.rank}: {fault}", is_misuse, new_bytes, payload, free)
        ready = gather_objects(mine, self.group)
        faults = [one for one in ready if one.fault]
        if faults:
            error = ValueError if all(one.is_misuse for one in faults) else RuntimeError
            raise error("weights were not delivered: " + "; ".join(one.fault for one in faults))
        return ready

    def misuse(self, shards: Mapping[str, Tensor]) -> str:
        for name, tensor in shards.items():
            if name not in self.shapes or name in self._written:
                return f"unknown or written twice: {name}"
            if tuple(tensor.shape) != tuple(self.shapes[name]):
                return f"shard {name!r} has shape {tuple(tensor.shape)}, expected {tuple(self.shapes[name])}"
            if tensor.dtype != self._dtypes[name]:
                return f"shard {name!r} is in {tensor.dtype}, but the servers' in {self._dtypes[name]}"
        return ""

    def _settle(self) -> str:
        """Wait for the bucket that is being read; how that failed."""
        posting, self._posting = self._posting, None
        try:
            if posting is not None:
                posting.result()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    # --- the servers -----------------------------------------------------------------------------------------------

    def _begin(self) -> tuple[int, tuple[str, ...], bool]:
        """How many servers there are, their devices, and whether all have the receiver."""
        devices: set[str] = set()
        loaders: list[Sequence[str]] = []

        async def begin(client: SGLangClient) -> None:
            info = await client.server_info()
            devices.add(str(info.get("device")))
            loaders.append(info.get("custom_weight_loader") or ())
            if self.needs_session:
                await _open_session(client)

        self.each(begin)
        return len(self.clients), tuple(sorted(devices)), all(RECEIVER in known for known in loaders)

    def _finish(self, sums: Sequence[ServerSums]) -> str:
        reasons: list[str] = []

        async def finish(client: SGLangClient) -> None:
            await self.complete(client)
            if self.needs_session:
                await client.end_weight_update()
            if self._recomputed and not self.runs_loader:
                # The end of a session without a write runs the model's post_load_weights (end_weight_update in
                # sglang.srt.managers.scheduler_components.weight_updater); after writes SGLang leaves it out.
                await client.begin_weight_update()
                await client.end_weight_update()
            if self._verify:
                proof = self._proofs[client.url] = await prove(
                    client, sums, self.runs_loader, self.layout, self.dtype, self._usual
                )
                reasons.extend([proof.reason] if proof.reason else [])

        self.each(finish)
        return "; ".join(reasons) if self._verify else "delivery_options.verify is false"


def _is_here(url: str) -> bool:
    """Whether ``url`` is on this machine, as far as its name tells."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")


async def _each(clients: Sequence[SGLangClient], action: Callable[[SGLangClient], Post]) -> None:
    for outcome in await asyncio.gather(*map(action, clients), return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _open_session(client: SGLangClient) -> None:
    try:
        await client.begin_weight_update()
    except (ServerError, RequestError) as error:
        if "already open" not in str(error):
            raise
        logger.warning("%s still has the session of an update that failed; beginning anew", client)
        await client.end_weight_update()
        await client.begin_weight_update()


TRANSFERS: Registry[type[WeightTransfer]] = Registry("weight delivery")
