"""`Replica`: one rank's place among the ranks that share servers, and how the first of them calls the others.

While the first rank waits for answers, the others wait for its calls: to write weights again, or that generation has
ended. A call comes at least every so often, because collectives give up after a time. Whether generation succeeded is
then agreed on, as everywhere (`parallel.agreement`).
"""

from __future__ import annotations

import contextlib
import functools
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from megatron_rl.config import ConfigError
from megatron_rl.parallel.agreement import Agreement, Alone, GroupPeers
from megatron_rl.parallel.groups import gather_objects
from megatron_rl.reshard import Layout
from megatron_rl.rollout.base import ServersLostError

Call = Literal["wait", "rewrite", "done", "lost"]


@dataclass
class Replica:
    """Read-only, apart from the time of the last call."""

    index: int  # of this replica
    count: int  # replicas
    tp: int
    ranks: tuple[int, ...]  # global ranks, in the order of the servers' tensor-parallel ranks
    rank: int
    group: dist.ProcessGroup | None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where the group's backend takes tensors
    _called: float = field(default_factory=time.monotonic, repr=False)

    @classmethod
    def of(
        cls, layout: Layout, rank: int, group: dist.ProcessGroup | None, device: torch.device | str = "cpu"
    ) -> Replica:
        """The replica of ``rank`` in a `rollout_layout`; collective over ``group``.

        Raises:
            ConfigError: the rank takes no part, or the replica's ranks are on several machines.
        """
        order = list(layout.replica_of)
        if rank not in layout.replica_of:
            raise ConfigError(f"rank {rank} takes no part in the rollout layout {layout.name!r} (ranks {order})")
        tp = len(set(layout.replica_of.values()))
        index = order.index(rank) // tp
        ranks = tuple(order[index * tp : (index + 1) * tp])
        replica = cls(index, len(order) // tp, tp, ranks, rank, group, torch.device(device))
        hosts = gather_objects(socket.gethostname(), group)
        if len(set(hosts)) > 1:
            raise ConfigError(
                f"the ranks {list(replica.ranks)} of one rollout replica are on machines {sorted(set(hosts))}, but a "
                f" server is started on one: lower actor.rollout.tp to at most the ranks of one machine"
            )
        return replica

    @property
    def leads(self) -> bool:
        """Whether this rank talks to the servers."""
        return self.rank == self.ranks[0]

    def call(self, call: Call) -> None:
        """On the first rank: tell the others."""
        self._called = time.monotonic()
        if self.group is not None:
            dist.broadcast_object_list([call], src=self.ranks[0], group=self.group)

    def heartbeat(self, seconds: float) -> None:
        """Call once more when the last call is ``seconds`` ago."""
        if time.monotonic() - self._called >= seconds:
            self.call("wait")

    @functools.cached_property
    def agreement(self) -> Agreement:
        """Of the replica's ranks."""
        peers = Alone(self.rank) if self.group is None else GroupPeers(self.group, self.device)
        return Agreement(peers)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """On the first rank, beside `rewrites` on the others: the last call at the end, and the vote on how it went."""
        self._called = time.monotonic()
        lost: ServersLostError | None = None
        with self.agreement.attempt("generation"):
            last: Call = "done"
            try:
                yield
            except ServersLostError as error:
                last, lost = "lost", error
            finally:
                self.call(last)
        if lost is not None:
            raise lost

    def rewrites(self) -> Iterator[None]:
        """On the other ranks, beside `calling` on the first: each call to write weights again, until generation ends.

        Raises:
            ServersLostError: the first rank's servers hold no weights.
            PeerError: the first rank failed.
        """
        received: list[Call] = ["wait"]
        with self.agreement.attempt("generation"):
            while received[0] not in ("done", "lost"):
                dist.broadcast_object_list(received, src=self.ranks[0], group=self.group)
                if received[0] == "rewrite":
                    yield
        if received[0] == "lost":
            raise ServersLostError(f"the servers of rank {self.ranks[0]} hold no weights any more", {})
