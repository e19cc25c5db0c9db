"""`Link`: one way from a node to the others (a network interface), as one lane of ranks uses it.

Each link has a process group of its own, so a link that stalls or dies takes no other with it.
"""

# mypy: disable-error-code="attr-defined, assignment"
# torch's stubs lack these methods and options.
from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

THREADS = 2  # of gloo, for each link
CLOSING = 2**31 - 1  # a tag that no exchange uses


@dataclass
class Ballot:
    """A vote that a link has announced."""

    tag: int
    rounds: list[tuple[int, Tensor, dist.Work]] = field(default_factory=list)  # nodes ahead, what comes from behind


class Link:
    """One lane over one interface: the ranks at one index of every node.

    Args:
        store: of this lane and link alone (a prefix).
        node, num_nodes: this rank's place in the lane.
        interface: name of the network interface; "" leaves the choice to gloo (GLOO_SOCKET_IFNAME, or the host's name).
        timeout: seconds that one exchange may take.
    """

    def __init__(self, store: dist.Store, node: int, num_nodes: int, interface: str, timeout: float) -> None:
        self.interface, self.node, self.num_nodes = interface, node, num_nodes
        self._group = _gloo(store, node, num_nodes, interface, timedelta(seconds=timeout))

    @property
    def name(self) -> str:
        return self.interface or "default interface"

    def receive(self, piece: Tensor, node: int, tag: int) -> dist.Work:
        """Begin to fill ``piece``, contiguous, with what ``node`` sends under the same tag."""
        return self._group.recv([piece], node, tag)

    def send(self, piece: Tensor, node: int, tag: int) -> dist.Work:
        """Begin to send ``piece``, contiguous, to ``node``; it is read until the work is done."""
        return self._group.send([piece], node, tag)

    def expect_vote(self, tag: int) -> Ballot:
        """Announce the messages of a vote under ``tag``."""
        ballot, reach = Ballot(tag), 1
        while reach < self.num_nodes:
            heard = torch.empty(1, dtype=torch.int64)
            work = self.receive(heard, (self.node - reach) % self.num_nodes, tag)
            ballot.rounds.append((reach, heard, work))
            reach *= 2
        return ballot

    def vote(self, mask: int, ballot: Ballot, timeout: float) -> int:
        """The bitwise or of the nodes' masks, in log2 of their number rounds: each tells one twice as far ahead."""
        known, limit = torch.tensor([mask]), timedelta(seconds=timeout)
        for reach, heard, arriving in ballot.rounds:
            leaving = self.send(known, (self.node + reach) % self.num_nodes, ballot.tag)
            arriving.wait(limit)
            leaving.wait(limit)
            known = known | heard
        return int(known)

    def close(self) -> None:
        """Break the connections, so that nothing arrives late: gloo does so when an operation is out of time."""
        peer = (self.node + 1) % self.num_nodes
        with contextlib.suppress(RuntimeError):
            self.receive(torch.empty(1), peer, CLOSING).wait(timedelta(milliseconds=1))


def _gloo(store: dist.Store, rank: int, size: int, interface: str, limit: timedelta) -> dist.ProcessGroupGloo:
    if not interface:
        return dist.ProcessGroupGloo(store, rank, size, limit)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(interface=interface)]
    options._timeout = limit
    options._threads = THREADS
    return dist.ProcessGroupGloo(store, rank, size, options)


def split(total: int, weights: Sequence[float]) -> Sequence[int]:
    """``total`` elements in proportion to ``weights``: how many each gets. The same on every rank."""
    return _split(total, tuple(weights))


@functools.lru_cache(maxsize=1024)
def _split(total: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    whole, running = sum(weights), 0.0
    sizes: list[int] = []
    for weight in weights:
        running += weight
        sizes.append(round(total * running / whole) - sum(sizes))
    return tuple(sizes)
