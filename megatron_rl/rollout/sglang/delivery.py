"""`Delivery`: how a replica's weights reach its servers. The engine pauses them before and names the version after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_rl.registry import Registry
from megatron_rl.reshard import Layout
from megatron_rl.rollout.sglang.client import SGLangClient
from megatron_rl.rollout.sglang.event_loop import EventLoop
from megatron_rl.rollout.sglang.verification import RankSums


class Delivery(Protocol):
    """One rank's part in handing weights over; all ranks of a replica call `deliver` together."""

    def deliver(self, clients: Sequence[SGLangClient], shards: Mapping[str, torch.Tensor]) -> None:
        """Return once every server of the replica provably holds the weights.

        Args:
            clients: the replica's paused servers on its first rank; empty on the others.
            shards: this rank's, by SGLang's own names; the values must have been read when this returns.

        Raises:
            ValueError: a shard is missing, unknown or of another shape, on any rank; nothing was written.
            RuntimeError: it failed, on any rank; servers may hold a mixture.
        """

    def attested(self, url: str) -> RankSums | None:
        """The checksums of a server right after the last delivery to it; None = it was not asked for them. On the
        replica's first rank only."""


class MakeDelivery(Protocol):
    """What builds a `Delivery`: a class, usually."""

    def __call__(
        self, *, loop: EventLoop, layout: Layout, rank: int, dtype: torch.dtype, tp_group: dist.ProcessGroup | None
    ) -> Delivery:
        """
        Args:
            loop: runs the clients' coroutines: ``loop.run(client.flush_cache())``.
            layout: of the rollout weights; ``layout.shards(rank)`` are this rank's.
            dtype: of the servers' weights.
            tp_group: the replica's ranks, in the order of the servers' tensor-parallel ranks; None = this rank alone.
        """


DELIVERIES: Registry[MakeDelivery] = Registry("weight delivery")
