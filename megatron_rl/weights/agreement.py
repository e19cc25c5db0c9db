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
from dataclasses import dataclass
from typing import ParamSpec

import torch
from torch import Tensor

from megatron_rl.reshard import Transport

P = ParamSpec("P")

TEXT_BYTES = 2032  # of a message that travels with a vote


class PeerError(RuntimeError):
    """Another rank failed; its own error says why."""


class Attempt:
    """What went wrong on this rank so far."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.statement = ""  # what this rank takes for granted: the attempt fails unless all ranks say the same

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
        consequence: ends the message of `PeerError`.
    """

    def __init__(
        self,
        transport: Transport,
        ranks: Sequence[int],
        rank: int,
        device: torch.device | str = "cpu",
        consequence: str = "nothing was published",
    ) -> None:
        self._transport, self._rank, self._device = transport, rank, device
        self._ranks, self._consequence = sorted(ranks), consequence

    @contextlib.contextmanager
    def attempt(self, consequence: str = "") -> Iterator[Attempt]:
        """Collective: on leaving, wait for all ranks and raise on each of them if any failed.

        Args:
            consequence: ends the message of this attempt's `PeerError`, in place of the usual one.

        Raises:
            Exception: this rank's own error, after the others were told.
            PeerError: another rank's, or ranks state different things.
            TransportError: a rank is gone.
        """
        attempt = Attempt()
        try:
            yield attempt
        except Exception as failure:
            attempt.error = attempt.error or failure
        error = attempt.error
        mine = _Vote(self._rank, error is not None, attempt.statement if error is None else _one_line(error))
        verdict = _Vote.read(self.reduce(mine.written(self._device), _joined))
        if error is not None:
            raise error
        if verdict.failed:
            raise PeerError(f"rank {verdict.rank} failed: {verdict.text}; {consequence or self._consequence}")

    def total(self, values: Tensor) -> Tensor:
        """Collective: the sum of the ranks' ``values``, of one shape and dtype, on every rank."""
        return self.reduce(values, torch.add)

    def reduce(self, value: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Collective: up a binomial tree and down again, so that every rank has the same result.

        Raises:
            TransportError: a rank is gone.
        """
        me, step = self._ranks.index(self._rank), 1
        while step < len(self._ranks) and not me & step:
            if me + step < len(self._ranks):
                other = torch.empty_like(value)
                self._exchange(me + step, None, other)
                value = combine(value, other)
            step *= 2
        if me:
            self._exchange(me - step, value, None)
            value = torch.empty_like(value)
            self._exchange(me - step, None, value)
        while step > 1:
            step //= 2
            if me + step < len(self._ranks):
                self._exchange(me + step, value, None)
        return value

    def _exchange(self, peer: int, send: Tensor | None, receive: Tensor | None) -> None:
        self._transport.exchange(self._ranks[peer], send, receive).wait()


@dataclass(frozen=True, slots=True)
class _Vote:
    """What one rank, or all ranks of one branch of the tree, have to say."""

    rank: int  # that says so
    failed: bool
    text: str  # why it failed, or what it states

    def written(self, device: torch.device | str) -> Tensor:
        text = self.text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
        numbers = self.rank.to_bytes(8, "little") + int(self.failed).to_bytes(8, "little")
        return torch.frombuffer(bytearray(numbers + text), dtype=torch.uint8).to(device)

    @classmethod
    def read(cls, tensor: Tensor) -> _Vote:
        data = bytes(tensor.cpu().tolist())
        text = data[16:].rstrip(b"\0").decode(errors="ignore")
        return cls(int.from_bytes(data[:8], "little"), bool(data[8]), text)


def _joined(left: Tensor, right: Tensor) -> Tensor:
    """The vote of both branches: the failure of the lowest rank, or a failure where they contradict one another."""
    a, b = _Vote.read(left), _Vote.read(right)
    if a.failed or (not b.failed and a.text == b.text):
        return left
    if b.failed:
        return right
    return _Vote(b.rank, True, f"it states [{b.text}] where rank {a.rank} states [{a.text}]").written(left.device)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
