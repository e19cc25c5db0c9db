"""`BucketRelay`: one rank's part of an update whose buckets travel through mailboxes, within one request.

    post: all ranks vote: has every server read the last bucket?  -- no, and nothing failed: look and vote again
                                                                  '- yes: each rank puts its next one into its boxes

A mailbox has one sender, this rank, and one reader, the rank of a server that holds the same shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum

import torch

from megatron_rl.parallel.agreement import Agreement
from megatron_rl.rollout.sglang.weight_transfer.bucket_mailbox import Mailbox

RELAY_SECONDS = 60.0  # then another request begins: SGLang's watchdog ends schedulers that seem stuck for 300 s
REQUEST_SECONDS = 1800.0  # that a request may take: a bucket of a slow training layout may be long in coming
NAP, ROUND = 2e-4, 0.05  # seconds between two looks at the mailboxes, and between two votes
SHARD_BYTES = (
    4096  # of a mail, for each shard beside its name: a handle, pickled, as base64; unused memory is not taken
)


class _Vote(IntEnum):
    """Of one rank."""

    READ = 0
    WAITING = 1
    LEAVE = 2  # this bucket needs a request of its own, or the request is too old
    FAILED = 3


class BucketRelay:
    """Mailboxes for the servers of a replica.

    Args:
        agreement: of the replica's ranks.
        shapes: of this rank's shards, by name.
    """

    def __init__(self, agreement: Agreement, shapes: Mapping[str, Sequence[int]], num_servers: int) -> None:
        self._agreement, self._opened = agreement, time.monotonic()
        self._max_bytes = SHARD_BYTES + sum(2 * len(name) + SHARD_BYTES for name in shapes)
        self._boxes = [Mailbox(self._max_bytes) for _ in range(num_servers)]

    @property
    def paths(self) -> list[str]:
        """Of the mailbox for each server."""
        return [box.path for box in self._boxes]

    def post(self, fits: bool, mails: Callable[[], Sequence[bytes]], failure: Callable[[], str]) -> bool:
        """Pass a bucket on, once all servers have read the last one. Collective over the replica's ranks.

        Args:
            fits: this rank's bucket can go this way.
            mails: makes those for each server, once it is certain that they go: a handle that nobody opens keeps its
                memory.
            failure: why the request takes no more buckets, as far as this rank knows; "" = it does.

        Returns:
            Whether it went. Otherwise the relay is of no more use, on all ranks; unless there is an `error` or the
            request has failed, the last bucket was read.
        """
        leaves = not fits or time.monotonic() > self._opened + RELAY_SECONDS
        while True:
            self._look()
            is_read = all(box.is_read for box in self._boxes)
            mine = _Vote.WAITING if not is_read else _Vote.LEAVE if leaves else _Vote.READ
            mine = _Vote.FAILED if self.error or failure() else mine
            votes = self._agreement.peers.gather(torch.tensor([mine]))[:, 0].tolist()
            if _Vote.FAILED in votes or _Vote.WAITING not in votes:
                break
        if max(votes) != _Vote.READ:
            return False
        self.put(mails())
        return True

    @property
    def error(self) -> str:
        """Why a server could not write a bucket of this rank; "" = all could, so far."""
        return next((box.error for box in self._boxes if box.error), "")

    def put(self, mails: Sequence[bytes]) -> None:
        """Pass a bucket on; the last one was read."""
        for box, mail in zip(self._boxes, mails, strict=True):
            box.post(mail)

    def close(self) -> None:
        """End the request: servers answer it when they have read what they were given."""
        for box in self._boxes:
            box.end()
            box.close()

    def _look(self) -> None:
        """Return when all servers have read the last bucket, or after a while."""
        deadline = time.monotonic() + ROUND
        while not all(box.is_read or box.error for box in self._boxes) and time.monotonic() < deadline:
            time.sleep(NAP)
