"""`Agreement`: an error on one rank becomes an error on every rank, before any of them waits for it in a collective.

    with context.attempt("evaluation") as attempt:
        exchange(...)                       # all ranks take part, whatever has failed so far
        attempt.run(write, file, tensors)   # an error is kept until the end
    # here every rank succeeded; otherwise the failed one raised its own error, and the others `PeerError`

A vote is one all-gather of 24 bytes a rank; texts travel only when something failed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.parallel.abandon import Abandoned

P = ParamSpec("P")

TEXT_BYTES = 2048  # of a message; what is longer is cut
SETTLE_SECONDS = 0.2  # at the end of a process, for gloo's threads
SUCCEEDED, FAILED, MISTAKEN = 0, 1, 2  # the first number of a vote; MISTAKEN = a ConfigError
ABANDONED = 64  # plus the signal


class TransportError(RuntimeError):
    """An exchange with other ranks failed or took too long."""


class PeerError(RuntimeError):
    """Another rank failed; the message is that rank's."""


class PeerConfigError(PeerError, ConfigError):
    """Another rank met a mistake in the configuration."""


class Peers(ABC):
    """The ranks of one job, seen from one of them.

    Attributes:
        ranks: global ranks, in the order of what `gather` returns.
    """

    ranks: tuple[int, ...]

    @abstractmethod
    def gather(self, value: Tensor) -> Tensor:
        """Collective: ``value`` of each rank, of one shape and dtype, as ``[num_ranks, *shape]`` on every rank."""

    @abstractmethod
    def total(self, value: Tensor) -> Tensor:
        """Collective: the sum over the ranks of ``value``, of one shape and dtype, on every rank."""


class Alone(Peers):
    """One process."""

    def __init__(self, rank: int = 0) -> None:
        self.ranks = (rank,)

    def gather(self, value: Tensor) -> Tensor:
        return value[None]

    def total(self, value: Tensor) -> Tensor:
        return value


class GroupPeers(Peers):
    """The ranks of a process group.

    Args:
        device: where the group's backend takes tensors.
        timeout: seconds that a gloo collective may take; NCCL's own watchdog bounds others. None = the group's.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device | str = "cpu", timeout: float | None = None
    ) -> None:
        _settle_at_exit()
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self._group, self._device, self._timeout = group, torch.device(device), timeout

    def gather(self, value: Tensor) -> Tensor:
        own = value.to(self._device).contiguous()
        found = [torch.empty_like(own) for _ in self.ranks]
        self._wait(dist.all_gather(found, own, self._group, async_op=True))
        return torch.stack(found).to(value.device)

    def total(self, value: Tensor) -> Tensor:
        own = value.to(self._device, copy=True)
        self._wait(dist.all_reduce(own, group=self._group, async_op=True))
        return own.to(value.device)

    def _wait(self, work: dist.Work | None) -> None:
        assert work is not None, "this rank is not in the group"
        try:
            if self._timeout is not None and self._device.type == "cpu":
                work.wait(timedelta(seconds=self._timeout))
            else:
                work.wait()
        except RuntimeError as error:
            raise TransportError(f"a rank of {list(self.ranks)} failed or did not answer in time: {error}") from error


@functools.cache
def _settle_at_exit() -> None:
    """A thread of gloo gives a collective's tensors back a moment after it was waited for, and needs Python's lock for
    it. Where Python has ended by then, the thread ends the process with SIGABRT (seen with torch 2.13)."""
    atexit.register(time.sleep, SETTLE_SECONDS)


class Attempt:
    """What went wrong on this rank so far."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.statement = ""  # must be equal on all ranks, or the attempt fails

    def run(self, action: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``action``, unless an earlier one failed; keep its error."""
        if self.error is None:
            try:
                action(*args, **kwargs)
            except Exception as error:
                self.error = error


class Agreement:
    """Attempts of ``peers`` that succeed on all of them or fail on all of them.

    Args:
        consequence: appended to the message of `PeerError`.
    """

    def __init__(self, peers: Peers, consequence: str = "") -> None:
        self.peers, self._consequence = peers, consequence

    @contextlib.contextmanager
    def attempt(self, what: str = "", consequence: str = "") -> Iterator[Attempt]:
        """Collective: on leaving, wait for all ranks and raise on each of them if any failed.

        Args:
            what: the operation, for the message of `PeerError`.
            consequence: replaces the default of this `Agreement`.

        Raises:
            Exception: this rank's own error, after the others were told.
            PeerError: another rank's, or ranks state different things; a `ConfigError` as well where that rank met one.
            TransportError: a rank is gone.
            Abandoned: a rank has abandoned the step, whatever else went wrong.
        """
        attempt = Attempt()
        try:
            yield attempt
        except TransportError:
            raise  # a rank is gone, so a vote would only wait for it once more
        except (Exception, Abandoned) as failure:
            attempt.error = failure if isinstance(failure, Abandoned) else attempt.error or failure
        failure_elsewhere = self._vote(attempt)
        if attempt.error is not None:
            raise attempt.error
        if failure_elsewhere is not None:
            subject = f"{what} failed on rank {failure_elsewhere.rank}" if what else str(failure_elsewhere)
            ending = consequence or self._consequence
            message = f"{subject}: {failure_elsewhere.text}" + (f"; {ending}" if ending else "")
            raise (PeerConfigError if failure_elsewhere.mistaken else PeerError)(message)

    def _vote(self, attempt: Attempt) -> _Failure | None:
        """The failure of the lowest rank; None if all succeeded and state the same."""
        error = attempt.error
        outcome = SUCCEEDED if error is None else MISTAKEN if isinstance(error, ConfigError) else FAILED
        if isinstance(error, Abandoned):
            outcome = ABANDONED + error.signal
        digest = hashlib.blake2b(attempt.statement.encode(), digest_size=16).digest()
        mine = torch.frombuffer(bytearray(outcome.to_bytes(8, "little") + digest), dtype=torch.uint8)
        votes = self.peers.gather(mine)
        if not votes[:, 0].any() and (votes == votes[0]).all():
            return None
        if (gave_up := int(votes[:, 0].max())) >= ABANDONED:
            raise Abandoned(gave_up - ABANDONED)
        text = attempt.statement if error is None else " ".join(f"{type(error).__name__}: {error}".split())
        texts = [_decoded(row) for row in self.peers.gather(_encoded(text))]
        for rank, vote, said in zip(self.peers.ranks, votes[:, 0].tolist(), texts, strict=True):
            if vote != SUCCEEDED:
                return _Failure(rank, said, vote == MISTAKEN)
        other = next(i for i in range(len(texts)) if not torch.equal(votes[i], votes[0]))
        said = f"it states [{texts[other]}] where rank {self.peers.ranks[0]} states [{texts[0]}]"
        return _Failure(self.peers.ranks[other], said, False)


@dataclass(frozen=True, slots=True)
class _Failure:
    rank: int
    text: str
    mistaken: bool

    def __str__(self) -> str:
        return f"rank {self.rank} failed"


def _encoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8)


def _decoded(row: Tensor) -> str:
    return bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore")
