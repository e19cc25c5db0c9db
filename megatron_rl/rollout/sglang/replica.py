"""`Replica`: one rank's place among the ranks that share servers, and how the first of them calls the others.

While the first rank waits for answers, the others wait for its calls: to write weights again, or that all is done.
A call comes at least every so often, because collectives give up after a time.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch.distributed as dist

from megatron_rl.config import ConfigError
from megatron_rl.reshard import Layout
from megatron_rl.rollout.base import ServersLostError

Call = Literal["wait", "rewrite", "done", "lost", "failed"]


@dataclass
class Replica:
    """Read-only, apart from the time of the last call."""

    index: int  # of this replica
    count: int  # replicas
    tp: int
    ranks: tuple[int, ...]  # global ranks, in the order of the servers' tensor-parallel ranks
    rank: int
    group: dist.ProcessGroup | None
    _called: float = field(default_factory=time.monotonic, repr=False)

    @classmethod
    def of(cls, layout: Layout, rank: int, group: dist.ProcessGroup | None) -> Replica:
        """The replica of ``rank`` in a `rollout_layout`; collective over ``group``.

        Raises:
            ConfigError: the rank takes no part, or the replica's ranks are on several machines.
        """
        order = list(layout.replica_of)
        if rank not in layout.replica_of:
            raise ConfigError(f"rank {rank} takes no part in the rollout layout {layout.name!r} (ranks {order})")
        tp = len(set(layout.replica_of.values()))
        index = order.index(rank) // tp
        replica = cls(index, len(order) // tp, tp, tuple(order[index * tp : (index + 1) * tp]), rank, group)
        hosts = replica.gather(socket.gethostname())
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

    def gather(self, value: str) -> list[str]:
        if self.group is None:
            return [value]
        values: list[str] = [""] * self.tp
        dist.all_gather_object(values, value, group=self.group)
        return values

    def call(self, call: Call) -> None:
        """On the first rank: tell the others."""
        self._called = time.monotonic()
        if self.group is not None:
            dist.broadcast_object_list([call], src=self.ranks[0], group=self.group)

    def sign_of_life(self, seconds: float) -> None:
        """Call once more when the last call is ``seconds`` ago."""
        if time.monotonic() - self._called >= seconds:
            self.call("wait")

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """On the first rank: the others are let go at the end, with an error where there was one here."""
        self._called = time.monotonic()
        try:
            yield
        except ServersLostError:
            self.call("lost")
            raise
        except BaseException:
            self.call("failed")
            raise
        self.call("done")

    def calls(self) -> Iterator[Call]:
        """On the other ranks: each call, until the last.

        Raises:
            ServersLostError: the first rank's servers hold no weights.
            RuntimeError: the first rank failed.
        """
        while True:
            received: list[Call] = ["wait"]
            dist.broadcast_object_list(received, src=self.ranks[0], group=self.group)
            if received[0] == "lost":
                raise ServersLostError(f"the servers of rank {self.ranks[0]} hold no weights any more", {})
            if received[0] == "failed":
                raise RuntimeError(f"rank {self.ranks[0]}, which talks to the servers, failed: see its message")
            if received[0] == "done":
                return
            yield received[0]
