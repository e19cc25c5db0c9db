"""`Handover`: what all deliveries share: the ranks of a replica acting together, and a server's update session.

    checked --open--> writing --close--> verified           a failure on any rank is raised on all of them

A session that an earlier failure left open is closed first. Nothing counts as delivered before the server's own
checksums of its parameters are those of the shards.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.reshard import Layout
from megatron_rl.rollout.admission import check_shards
from megatron_rl.rollout.sglang.client import RequestError, ServerError, SGLangClient
from megatron_rl.rollout.sglang.event_loop import EventLoop
from megatron_rl.rollout.sglang.payload import fits_shared_memory
from megatron_rl.rollout.sglang.verification import MAX_NAMED, RankSums, server_checksums

logger = logging.getLogger(__name__)

BUCKET_BYTES = 256 << 20

T = TypeVar("T")


class Handover:
    """One rank's part in handing weights over; subclasses write in `write`.

    Args:
        loop, layout, rank, dtype, tp_group: see `delivery.MakeDelivery`.
        bucket_bytes: of one request, on each rank: bounds the extra memory on both sides.
        verify: compare the servers' checksums; one pass over all weights.
    """

    needs_session = True  # the servers want /begin_weight_update before and /end_weight_update after
    runs_loader = False  # the model's own load_weights, which also refreshes what it derives from its weights

    def __init__(
        self,
        *,
        loop: EventLoop,
        layout: Layout,
        rank: int,
        dtype: torch.dtype,
        tp_group: dist.ProcessGroup | None,
        bucket_bytes: int = BUCKET_BYTES,
        verify: bool = True,
    ) -> None:
        self.loop, self.layout, self.rank, self.dtype, self.group = loop, layout, rank, dtype, tp_group
        self.bucket_bytes, self._verify = bucket_bytes, verify
        self.ranks = [rank] if tp_group is None else dist.get_process_group_ranks(tp_group)
        self._shapes = {shard.name: shard.shape for shard in layout.shards(rank)}
        self._attested: dict[str, RankSums] = {}  # by url, on the first rank
        self.num_servers, self.shared = 0, False  # of the delivery under way; shared: servers can map our memory

    @property
    def leads(self) -> bool:
        return self.rank == self.ranks[0]

    def deliver(self, clients: Sequence[SGLangClient], shards: Mapping[str, Tensor]) -> None:
        """See `delivery.Delivery`."""
        for client in clients:
            self._attested.pop(client.url, None)
        self._check(shards)
        self.num_servers, self.shared = self._reach(clients, shards)
        if self.needs_session:
            self.lead(lambda: self.each(clients, _open))
        self.write(clients, shards)
        hashes = self.gather(_hashes(shards) if self._verify else {})
        self.lead(lambda: self._finish(clients, hashes))

    def attested(self, url: str) -> RankSums | None:
        """See `delivery.Delivery`."""
        return self._attested.get(url)

    def write(self, clients: Sequence[SGLangClient], shards: Mapping[str, Tensor]) -> None:
        """Put the weights into the servers; all ranks of the replica together."""
        raise NotImplementedError

    # --- the ranks of the replica ----------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Each rank's value, in the order of the servers' tensor-parallel ranks; on the first rank only."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * len(self.ranks) if self.leads else None
        dist.gather_object(value, values, dst=self.ranks[0], group=self.group)
        return values or []

    def lead(self, action: Callable[[], object]) -> None:
        """Run ``action`` on the first rank.

        Raises:
            RuntimeError: it failed; on every rank.
        """
        failure: Exception | None = None
        if self.leads:
            try:
                action()
            except Exception as error:
                failure = error
        told = [None if failure is None else f"{type(failure).__name__}: {failure}"]
        if self.group is not None:
            dist.broadcast_object_list(told, src=self.ranks[0], group=self.group)
        if told[0] is not None:
            raise RuntimeError(f"weights were not delivered: {told[0]}") from failure

    def each(
        self, clients: Sequence[SGLangClient], action: Callable[[SGLangClient], Coroutine[Any, Any, object]]
    ) -> None:
        """``action`` on all servers at once."""

        async def together() -> None:
            for outcome in await asyncio.gather(*map(action, clients), return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome

        self.loop.run(together())

    def _check(self, shards: Mapping[str, Tensor]) -> None:
        fault = ""
        try:
            check_shards(shards, self._shapes)
            wrong = {str(tensor.dtype) for tensor in shards.values()} - {str(self.dtype)}
            if wrong:
                raise ValueError(f"shards are in {sorted(wrong)}, but the servers' weights in {self.dtype}")
        except ValueError as error:
            fault = f"rank {self.rank}: {error}"
        faults: list[Any] = [fault]
        if self.group is not None:
            faults = [""] * len(self.ranks)
            dist.all_gather_object(faults, fault, group=self.group)
        if any(faults):
            raise ValueError("; ".join(filter(None, faults)))

    def _reach(self, clients: Sequence[SGLangClient], shards: Mapping[str, Tensor]) -> tuple[int, bool]:
        """The first rank's servers, and whether all can map memory of this machine."""
        new = sum(tensor.nbytes for tensor in shards.values() if not tensor.is_cuda and not tensor.is_shared())
        needed = sum(self.gather(new))  # once more for copies of whole tensors, a bucket at a time
        told: list[Any] = [None]
        if self.leads:
            here = all(_is_here(client.url) for client in clients)
            shared = here and fits_shared_memory(needed + self.bucket_bytes)
            if not shared:
                logger.warning("servers are on other machines or /dev/shm is full: weights go as bytes, slowly")
            told = [(len(clients), shared)]
        if self.group is not None:
            dist.broadcast_object_list(told, src=self.ranks[0], group=self.group)
        return told[0]

    # --- the servers -----------------------------------------------------------------------------------------------

    def _finish(self, clients: Sequence[SGLangClient], hashes: Sequence[Mapping[str, str]]) -> None:
        if self.needs_session:
            self.each(clients, SGLangClient.end_weight_update)

        async def compare(client: SGLangClient) -> None:
            self._attested[client.url] = await _compare(client, hashes, self.runs_loader)

        if self._verify:
            self.each(clients, compare)


def _is_here(url: str) -> bool:
    """Whether ``url`` is on this machine, as far as its name tells."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")


async def _open(client: SGLangClient) -> None:
    try:
        await client.begin_weight_update()
    except (ServerError, RequestError) as error:
        if "already open" not in str(error):
            raise
        logger.warning("%s still has the session of an update that failed; beginning anew", client)
        await client.end_weight_update()
        await client.begin_weight_update()


async def _compare(client: SGLangClient, hashes: Sequence[Mapping[str, str]], more: bool) -> RankSums:
    """The server's checksums.

    Args:
        more: it may hold parameters beside the given ones.

    Raises:
        ServerError: a rank does not hold the given parameters.
    """
    on_cpu = (await client.server_info()).get("device") == "cpu"
    ranks = await server_checksums(client)
    if len(ranks) != len(hashes):
        raise ServerError(f"{client} has {len(ranks)} ranks, expected {len(hashes)}")
    for tp_rank, held in ranks.items():
        expected = hashes[tp_rank]
        if not on_cpu:  # SGLang hashes there with a kernel of its own: only the names can be compared
            expected = {name: held.get(name, "") for name in expected}
        if more:
            held = {name: value for name, value in held.items() if name in expected}
        _compare_rank(f"{client}, rank {tp_rank}", held, expected)
    return ranks


def _compare_rank(where: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    derived = sorted(found.keys() - expected.keys())
    if derived:
        raise ServerError(
            f"{where} holds {derived[:MAX_NAMED]} beside the weights delivered: derived from them, it would be stale. "
            f"Choose actor.rollout.options.delivery=disk for this model"
        )
    missing = sorted(expected.keys() - found.keys())
    wrong = sorted(name for name in expected.keys() & found.keys() if found[name] != expected[name])
    if missing or wrong:
        raise ServerError(
            f"{where} does not hold the weights delivered: {len(wrong)} parameters differ {wrong[:MAX_NAMED]}, "
            f"{len(missing)} are missing {missing[:MAX_NAMED]}"
        )


def _hashes(shards: Mapping[str, Tensor]) -> dict[str, str]:
    """As `sglang.srt.managers.mm_utils.tensor_hash` of a CPU tensor: the first 8 bytes of SHA-256."""
    return {name: hashlib.sha256(_bytes(tensor)).hexdigest()[:16] for name, tensor in shards.items()}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def buckets(sizes: Mapping[str, int], bucket_bytes: int) -> list[list[str]]:
    """Names in their order, cut where a bucket would pass ``bucket_bytes``; a larger tensor goes alone."""
    cut: list[list[str]] = []
    filled = bucket_bytes
    for name, size in sizes.items():
        if not cut or filled + size > bucket_bytes:
            cut.append([])
            filled = 0
        cut[-1].append(name)
        filled += size
    return cut
