"""`Agreement`: ranks that build one result together, and learn of one another's failures before it is published.

A rank that fails must neither leave the others waiting for it nor let them publish a result that lacks its part:

    with agreement.attempt() as attempt:
        exchange(...)                       # all ranks take part, whatever has failed so far
        attempt.run(write, file, tensors)   # an error is kept until the end
    # here every rank succeeded; otherwise the failed one raised its error, and the others PeerError
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec

import torch

from megatron_rl.reshard import Transport

P = ParamSpec("P")


class PeerError(RuntimeError):
    """Another rank failed; its own error says why."""


class Attempt:
    """What went wrong on this rank so far."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def run(self, action: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``action``, unless an earlier one failed; keep its error."""
        if self.error is None:
            try:
                action(*args, **kwargs)
            except Exception as error:
                self.error = error


class Agreement:
    """The ranks of one job, seen from one of them.

    Args:
        device: where the transport's buffers must lie: NCCL wants them on the GPU.
    """

    def __init__(
        self, transport: Transport, ranks: Sequence[int], rank: int, device: torch.device | str = "cpu"
    ) -> None:
        self._transport, self._rank, self._device = transport, rank, device
        self._first, *self._others = sorted(ranks)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """Collective: on leaving, wait for all ranks and raise on each of them if any failed.

        Raises:
            Exception: this rank's own error, after the others were told.
            PeerError: another rank's.
        """
        attempt = Attempt()
        try:
            yield attempt
        except Exception as error:
            attempt.error = attempt.error or error
        failed = self._first_failed(attempt.error is not None)
        if attempt.error is not None:
            raise attempt.error
        if failed is not None:
            raise PeerError(f"rank {failed} failed, see its message; nothing was published")

    def _first_failed(self, mine: bool) -> int | None:
        status = torch.tensor([self._rank if mine else -1], dtype=torch.int64, device=self._device)
        if self._rank != self._first:
            verdict = torch.empty_like(status)
            self._transport.exchange(self._first, status, None).wait()
            self._transport.exchange(self._first, None, verdict).wait()
        else:
            answers = [status]
            for peer in self._others:
                answers.append(torch.empty_like(status))
                self._transport.exchange(peer, None, answers[-1]).wait()
            verdict = max(answers, key=lambda answer: int(answer.item()))
            for peer in self._others:
                self._transport.exchange(peer, verdict, None).wait()
        failed = int(verdict.item())
        return failed if failed >= 0 else None
