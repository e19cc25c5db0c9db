"""`Lane`: exchanges between nodes of one lane of ranks, spread over the links that work.

What a link carries is a share of every piece, in proportion to its weight. An exchange has three moments: `expect`
posts its receives, `send` begins its sends, `finish` waits. gloo sends only what the other side has announced to
receive, and the announcement queues behind the data on their connection: what is expected early is sent at once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives.link import Ballot, Link, split

BALLOTS = 2**30  # tags from here on are of votes
PATIENCE = 3  # with several links: the longest that an exchange may take, in time limits
VOTE = 8  # how far apart nodes may reach a vote, in time limits: two exchanges on either side


Begin = Callable[[Tensor, int, int], dist.Work]  # of a piece, with a node, under a tag


@dataclass(frozen=True)
class Exchange:
    """Receives and sends of one tag; by link, its works."""

    tag: int
    shares: dict[int, float]
    works: dict[int, list[dist.Work]]


class Lane:
    """The rank at one index of every node.

    Args:
        links: in the same order on all ranks.
        node: this rank's node.
    """

    def __init__(self, links: Sequence[Link], node: int, timeout: float) -> None:
        self.links, self.node, self.timeout = links, node, timeout
        self.failed = 0  # bit k: link k failed since the last `take_failures`
        self.reasons: dict[int, str] = {}
        self._tags, self._vote_tags = itertools.count(), itertools.count(BALLOTS)
        self._ballots: dict[int, Ballot] = {}
        # One for each link: what is stuck on one never keeps another waiting.
        self._threads = [ThreadPoolExecutor(1, "link") for _ in links] if len(links) > 1 else None

    def expect(self, pieces: Sequence[Tensor], shares: dict[int, float]) -> Exchange:
        """Begin to receive ``pieces[j]`` from node j; this node's own is left alone. In the same order on all ranks.

        Args:
            pieces: flat and contiguous, in node order.
            shares: weight of each link to use, by its index.
        """
        usable: dict[int, list[dist.Work]] = {index: [] for index in shares if not self.failed >> index & 1}
        exchange = Exchange(next(self._tags), dict(shares), usable)
        for index, node, piece in self._cut(exchange, pieces):
            self._begin(exchange, index, self.links[index].receive, piece, node)
        return exchange

    def send(self, exchange: Exchange, pieces: Sequence[Tensor]) -> None:
        """Begin to send ``pieces[j]`` to node j, as `expect` there has it; they are read until `finish`."""
        for index, node, piece in self._cut(exchange, pieces):
            self._begin(exchange, index, self.links[index].send, piece, node)

    def finish(self, exchange: Exchange) -> None:
        """Wait for an exchange.

        A link has failed when it says so, or when it is still busy a time limit after another one was done: as long as
        none is done the peer may be late, because it waits for a failed link itself.
        """
        if self._threads is None:
            for index, works in exchange.works.items():
                self._take(index, _error_of(works))
            return
        answers: SimpleQueue[tuple[int, RuntimeError | None]] = SimpleQueue()
        pending = {index for index, works in exchange.works.items() if works}
        for index in pending:
            self._threads[index].submit(_report, exchange.works[index], index, answers)
        started, first_done = time.monotonic(), None
        while pending:
            limit = started + PATIENCE * self.timeout if first_done is None else first_done + self.timeout
            try:
                index, error = answers.get(timeout=max(0.0, limit - time.monotonic()))
            except Empty:
                self._give_up(pending, time.monotonic() - started)
                return
            pending.remove(index)
            self._take(index, error)
            if error is None:
                first_done = first_done or time.monotonic()

    def expect_vote(self, usable: Iterable[int]) -> None:
        """Announce a vote on each link, so that its messages wait for no announcement."""
        self._ballots, tag = {}, next(self._vote_tags)
        for index in usable:
            if not self.failed >> index & 1:
                try:
                    self._ballots[index] = self.links[index].expect_vote(tag)
                except RuntimeError as error:
                    self._take(index, error)

    def vote(self, mask: int, usable: Iterable[int]) -> int | None:
        """The bitwise or of all nodes' masks, by whichever link answers first; None where none does.

        Nodes reach this at different times when one of them waited for a link that failed.
        """
        limit, links = VOTE * self.timeout + 1, [index for index in usable if index in self._ballots]
        if self._threads is None:
            try:
                return self.links[links[0]].vote(mask, self._ballots[links[0]], limit) if links else None
            except RuntimeError as error:
                self._note(0, error)
                return None
        pending = {
            self._threads[index].submit(self.links[index].vote, mask, self._ballots[index], limit): index
            for index in links
        }
        while pending:
            done, _ = wait_for(pending, limit, FIRST_COMPLETED)
            if not done:
                return None
            for future in done:
                index, failure = pending.pop(future), future.exception()
                if failure is None:
                    return future.result()
                self._note(index, failure)
        return None

    def take_failures(self) -> int:
        """Which links failed since the last call, as a mask."""
        failed, self.failed = self.failed, 0
        return failed

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads or ():
            thread.shutdown(wait=True)

    def _cut(self, exchange: Exchange, pieces: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
        """(link, node, its share of the piece) for every other node, the next one first."""
        others = (*range(self.node + 1, len(pieces)), *range(self.node))
        if len(exchange.shares) == 1:
            (index,) = exchange.shares
            for node in others if index in exchange.works else ():
                if pieces[node].numel():
                    yield index, node, pieces[node]
            return
        for node in others:
            shares = pieces[node].split(split(pieces[node].numel(), list(exchange.shares.values())))
            for index, share in zip(exchange.shares, shares, strict=True):
                if share.numel() and index in exchange.works:
                    yield index, node, share

    def _begin(self, exchange: Exchange, index: int, start: Begin, piece: Tensor, node: int) -> None:
        if self.failed >> index & 1:
            return
        try:
            exchange.works[index].append(start(piece, node, exchange.tag))
        except RuntimeError as error:
            self._take(index, error)

    def _give_up(self, pending: Iterable[int], seconds: float) -> None:
        for index in pending:
            self._take(index, RuntimeError(f"not done after {seconds:.1f} s"))

    def _take(self, index: int, error: RuntimeError | None) -> None:
        """Note an error of a link, and let nothing more arrive over it."""
        if error is None:
            return
        self._note(index, error)
        if not self.failed >> index & 1:
            self.failed |= 1 << index
            self.links[index].close()

    def _note(self, index: int, error: BaseException) -> None:
        self.reasons[index] = " ".join(str(error).split())[:160]


def _report(works: Sequence[dist.Work], index: int, answers: SimpleQueue[tuple[int, RuntimeError | None]]) -> None:
    answers.put((index, _error_of(works)))


def _error_of(works: Sequence[dist.Work]) -> RuntimeError | None:
    """Wait for all; the first error, after which the others' connections are broken as well."""
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        return error
    return None
