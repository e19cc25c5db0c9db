"""`Messages`: Python objects from one rank to another, by pickle, in the order in which they are sent.

Sending returns at once; `flush` waits until everything has been received. Meant for the bridge between training and
rollout ranks (`SplitWorld`), where the two sides work on different things and must not wait for one another.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel.agreement import TransportError


class Messages:
    """One rank's end.

    Args:
        group: over host memory; ranks are those of the group.
        timeout: seconds that a message may take, the sender's work included.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self._group, self._timeout = group, timedelta(seconds=timeout)
        self._under_way: list[tuple[int, dist.Work, Tensor]] = []  # a send's tensor must stay until it was received

    def send(self, value: object, ranks: Iterable[int]) -> None:
        """Begin to send ``value`` to each of ``ranks``.

        Raises:
            TransportError: a rank is gone.
        """
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        size = torch.tensor([content.numel()])
        for rank in ranks:
            for tensor in (size, content):
                try:
                    work = self._group.send([tensor], rank, 0)
                except RuntimeError as error:
                    raise TransportError(_gone(rank)) from error
                self._under_way.append((rank, work, tensor))

    def receive(self, rank: int) -> Any:
        """The next message of ``rank``.

        Raises:
            TransportError: that rank is gone, or sent nothing in time.
        """
        size = torch.zeros(1, dtype=torch.int64)
        self._take(size, rank)
        content = torch.empty(int(size), dtype=torch.uint8)
        self._take(content, rank)
        return pickle.loads(content.numpy().data)

    def _take(self, into: Tensor, rank: int) -> None:
        try:
            self._group.recv([into], rank, 0).wait(self._timeout)
        except RuntimeError as error:
            raise TransportError(_gone(rank)) from error

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all messages of this rank were received, each ``timeout`` seconds at most (None = the usual).

        Raises:
            TransportError: a receiver is gone, or took too long.
        """
        while self._under_way:
            rank, work, _ = self._under_way.pop(0)
            try:
                work.wait(self._timeout if timeout is None else timedelta(seconds=timeout))
            except RuntimeError as error:
                raise TransportError(_gone(rank)) from error


def _gone(rank: int) -> str:
    return f"rank {rank} has ended, or did not answer in time: see what it and its machine say"
