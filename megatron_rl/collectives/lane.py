"""`Lane`: the exchange between nodes of one lane of ranks, spread over the links that work.

What a link carries is a share of every part, in proportion to its weight. The sum of a part is taken in node order, so
neither the number of links nor their weights change a bit of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives.link import Link, split
from megatron_rl.ops.accumulate import accumulate

POLL = 2e-4  # seconds between polls
PATIENCE = 3  # with several links: the longest that an exchange may take, in time limits
VOTE = 8  # how far apart nodes may reach a vote, in time limits: two exchanges on either side


class Lane:
    """The rank at one index of every node.

    Args:
        links: in the same order on all ranks.
        node: this rank's node.
    """

    def __init__(self, links: Sequence[Link], node: int, timeout: float) -> None:
        self.links, self.node, self.timeout = links, node, timeout
        self.failed = 0  # bit k: link k failed in the exchange under way
        self.reasons: dict[int, str] = {}

    def reduce(self, parts: Sequence[Tensor], shares: dict[int, float]) -> Tensor:
        """Sum of the nodes' parts for this node: flat fp32.

        Args:
            parts: this node's contribution to each node, in node order; flat, fp32 or bf16.
            shares: weight of each link to use, by its index.
        """
        own = parts[self.node].numel()
        cuts = [_cuts(part.numel(), shares) for part in parts]
        mine, works, arrived = _cuts(own, shares), {}, {}
        for at, index in enumerate(shares):
            pieces = [part[cut[at][0] : cut[at][1]] for part, cut in zip(parts, cuts, strict=True)]
            size = mine[at][1] - mine[at][0]
            arrived[index] = parts[0].new_empty(len(parts) * size)
            send = torch.cat(pieces)
            works[index] = self._begin(
                index, send, [len(piece) for piece in pieces], arrived[index], [size] * len(parts)
            )
        self._finish(works)
        total = torch.empty(own)
        for at, index in enumerate(shares):
            start, stop = mine[at]
            accumulate(list(arrived[index].view(len(parts), -1).unbind()), total[start:stop])
        return total

    def gather(self, own: Tensor, wholes: Sequence[Tensor], shares: dict[int, float]) -> None:
        """Give ``own`` to all nodes, and fill ``wholes`` with each node's part, this one's included.

        Args:
            own: flat, of the dtype that travels.
            wholes: views to write to, in node order; any dtype.
        """
        cuts = [_cuts(whole.numel(), shares) for whole in wholes]
        works, arrived = {}, {}
        for at, index in enumerate(shares):
            start, stop = cuts[self.node][at]
            sizes = [cut[at][1] - cut[at][0] for cut in cuts]
            arrived[index] = own.new_empty(sum(sizes))
            send = own[start:stop].repeat(len(wholes))
            works[index] = self._begin(index, send, [stop - start] * len(wholes), arrived[index], sizes)
        self._finish(works)
        for at, index in enumerate(shares):
            sizes = [cut[at][1] - cut[at][0] for cut in cuts]
            for whole, cut, piece in zip(wholes, cuts, arrived[index].split(sizes), strict=True):
                whole[cut[at][0] : cut[at][1]].copy_(piece)

    def vote(self, mask: int, usable: Iterable[int]) -> int | None:
        """The bitwise or of all nodes' masks, by whichever link answers first; None where none does.

        Nodes reach this at different times when one of them waited for a link that failed.
        """
        limit = VOTE * self.timeout + 1
        votes = {}
        for index in usable:
            ballot = torch.tensor([mask], dtype=torch.int64)
            try:
                votes[index] = self.links[index].vote(ballot, limit), ballot
            except RuntimeError as error:
                self._note(index, error)
        deadline = time.monotonic() + limit
        while votes and time.monotonic() < deadline:
            for index, (work, ballot) in list(votes.items()):
                if not work.is_completed():
                    continue
                try:
                    work.wait()
                    return int(ballot)
                except RuntimeError as error:
                    self._note(index, error)
                    del votes[index]
            time.sleep(POLL)
        return None

    def take_failures(self) -> int:
        """Which links failed since the last call, as a mask."""
        failed, self.failed = self.failed, 0
        return failed

    def _begin(
        self, index: int, send: Tensor, send_counts: list[int], receive: Tensor, receive_counts: list[int]
    ) -> dist.Work | None:
        try:
            return self.links[index].exchange(send, send_counts, receive, receive_counts)
        except RuntimeError as error:
            self._fail(index, error)
            return None

    def _finish(self, works: dict[int, dist.Work | None]) -> None:
        """Wait for an exchange that was begun on several links at once.

        A link has failed when it says so, or when it is still busy a time limit after another one was done: as long as
        none is done the peer may be late, because it waits for a failed link itself.
        """
        pending = {index: work for index, work in works.items() if work is not None}
        started, first_done = time.monotonic(), None
        while pending:
            for index, work in list(pending.items()):
                if len(self.links) > 1 and not work.is_completed():
                    continue
                del pending[index]
                try:
                    work.wait()
                    first_done = first_done or time.monotonic()
                except RuntimeError as error:
                    self._fail(index, error)
            now = time.monotonic()
            if (first_done is not None and now - first_done > self.timeout) or now - started > PATIENCE * self.timeout:
                for index in pending:
                    self._fail(index, RuntimeError(f"not done after {now - started:.1f} s"))
                return
            if pending:
                time.sleep(POLL)

    def _fail(self, index: int, error: RuntimeError) -> None:
        self.failed |= 1 << index
        self._note(index, error)

    def _note(self, index: int, error: RuntimeError) -> None:
        self.reasons[index] = " ".join(str(error).split())[:160]


def _cuts(total: int, shares: dict[int, float]) -> list[tuple[int, int]]:
    """(start, stop) of each link's share of ``total`` elements."""
    cuts, start = [], 0
    for size in split(total, list(shares.values())):
        cuts.append((start, start + size))
        start += size
    return cuts
