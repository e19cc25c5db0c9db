"""What training ranks and rollout ranks say to one another: orders one way, batches and answers the other.

    training rank 0 -> all rollout ranks     Order (these weights; evaluate), Stop
    rollout rank r  -> its training ranks    Ready, Handed (a batch), Evaluated, GaveUp, Failed

Each training rank gets the same kinds of message in the same order, from one rollout rank. A rollout rank reads an
order when it has nothing else to do, and answers `Ready` before any push, so that a push never waits for sampling and
every failure has its own words.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.parallel.abandon import Abandoned
from megatron_rl.parallel.agreement import PeerConfigError, PeerError
from megatron_rl.parallel.worlds import SplitWorld
from megatron_rl.weights.target import TargetFacts

T = TypeVar("T")
Events = Sequence[Sequence[Mapping[str, Any]]]  # of a trace, by rank


@dataclass(frozen=True, slots=True)
class Start:
    """Where the run begins or goes on. Part of the first `Order`."""

    step: int  # the first batch to be sampled
    source: Mapping[str, Any]  # of the prompts
    calls: int  # of `PromptSeeds.training`


@dataclass(frozen=True, slots=True)
class Order:
    """The weights after ``step`` steps are there: sample what they are for."""

    step: int
    version: int
    push: bool  # a push of the weights follows
    evaluate: bool = False
    start: Start | None = None
    oldest: int = 0  # the oldest checkpoint is of this step: batches before it are not needed any more


@dataclass(frozen=True, slots=True)
class Stop:
    """The training ranks have finished."""

    signal: int = 0  # that ended the run
    error: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)  # the newest ones


@dataclass(frozen=True, slots=True)
class Ready:
    """The order was read, and the engine is idle."""

    target: TargetFacts


@dataclass(frozen=True, slots=True)
class Handed:
    """One training replica's share of a batch."""

    step: int
    batch: Batch  # prompts, samples, rewards; its metrics for training rank 0 only
    source: Mapping[str, Any]  # state of the prompts after this batch
    calls: int
    signal: int  # that told the rollout ranks to stop, after this batch
    journalled: bool = False  # it was finished before the run was resumed
    events: Events = ()  # of each rollout rank, for the trace; for training rank 0 only


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The answer to `Order.evaluate`."""

    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class GaveUp:
    """A signal told the run to stop, and this batch's or evaluation's time was over."""

    signal: int


@dataclass(frozen=True, slots=True)
class Failed:
    """An error on the rollout ranks, which end."""

    message: str
    mistaken: bool  # a mistake in the configuration


class TrainingSide:
    """A training rank's end.

    Attributes:
        target: what the rollout engine is like; known after the first order.
        gave_up: whether the rollout ranks have given up what was ordered, because of a signal.
        waited_s: seconds spent waiting for rollout ranks since it was set to 0.
    """

    def __init__(self, split: SplitWorld) -> None:
        self._split, self._sender = split, split.sender(split.rank)
        self._early: deque[Handed] = deque()  # batches that came before they were asked for
        self.target: TargetFacts | None = None
        self.gave_up = False
        self.waited_s = 0.0

    def order(self, order: Order) -> None:
        """Give an order, and wait until the rollout ranks have read it."""
        if self._split.rank == 0:
            self._split.messages.flush()  # of the order before, which was answered
            self._split.messages.send(order, self._split.rollout_ranks)
        self.target = self._next(Ready).target

    def batch(self) -> Handed:
        """The next batch."""
        return self._early.popleft() if self._early else self._next(Handed)

    def waiting(self, count: int) -> list[Handed]:
        """The next ``count`` batches, which stay; fewer where the rollout ranks give up."""
        while len(self._early) < count and not self.gave_up:
            try:
                self._early.append(self._next(Handed))
            except Abandoned:
                break
        return list(self._early)

    def put(self, batches: Iterable[Handed]) -> None:
        """Batches of an earlier run, to be the next."""
        self._early.extend(batches)

    def evaluation(self) -> dict[str, float]:
        """The answer to `Order.evaluate`."""
        return self._next(Evaluated).metrics

    def stop(self, stop: Stop, timeout: float | None = None) -> None:
        """Tell the rollout ranks to end, and wait until they know, ``timeout`` seconds at most."""
        if self._split.rank == 0:
            self._split.messages.send(stop, self._split.rollout_ranks)
            self._split.messages.flush(timeout)

    def _next(self, kind: type[T]) -> T:
        """The next message of ``kind``; batches that come before it are kept.

        Raises:
            PeerError, ConfigError: what failed on the rollout ranks.
            Abandoned: they gave up.
            TransportError: they are gone.
        """
        while True:
            started = time.perf_counter()
            message = self._split.messages.receive(self._sender)
            self.waited_s += time.perf_counter() - started
            if isinstance(message, Failed):
                raise (PeerConfigError if message.mistaken else PeerError)(f"on the rollout ranks, {message.message}")
            if isinstance(message, GaveUp):
                self.gave_up = True
                raise Abandoned(message.signal)
            if isinstance(message, kind):
                return message
            assert isinstance(message, Handed), f"{message} came where {kind.__name__} was expected"
            self._early.append(message)


class RolloutSide:
    """A rollout rank's end.

    Attributes:
        waited_s: seconds spent waiting for training ranks since it was set to 0.
    """

    def __init__(self, split: SplitWorld) -> None:
        self._split, self._receivers = split, split.receivers(split.rank)
        self.waited_s = 0.0

    def order(self) -> Order | Stop:
        """The next order."""
        started = time.perf_counter()
        found: Order | Stop = self._split.messages.receive(0)
        self.waited_s += time.perf_counter() - started
        return found

    def ready(self, target: TargetFacts) -> None:
        """Answer an order; the training ranks are waiting for it, and have taken all that was handed over before."""
        self._split.messages.flush()
        self._tell(Ready(target))

    def hand_over(
        self,
        step: int,
        batch: Batch,
        metrics: dict[str, float],
        source: Mapping[str, Any],
        calls: int,
        signal: int,
        journalled: bool,
        events: Events,
    ) -> None:
        """Send each training replica its share of ``batch``; returns at once.

        Args:
            batch: of all replicas, equal on all rollout ranks.
            metrics: of the rollout ranks together.
        """
        grid = self._split.training
        for dp in sorted({grid.coordinates(rank).dp for rank in self._receivers}):
            share = share_of(batch, dp, grid.dp)
            ranks = [rank for rank in self._receivers if grid.coordinates(rank).dp == dp]
            for reports in (True, False):
                if not (own := [rank for rank in ranks if (rank == 0) == reports]):
                    continue
                share.metrics = metrics if reports else {}
                seen = events if reports else ()
                self._split.messages.send(Handed(step, share, source, calls, signal, journalled, seen), own)

    def evaluated(self, metrics: dict[str, float]) -> None:
        self._tell(Evaluated(metrics))

    def gave_up(self, signal: int) -> None:
        self._tell(GaveUp(signal))

    def failed(self, error: BaseException, timeout: float) -> None:
        """Tell the training ranks, and wait until they know, ``timeout`` seconds at most."""
        self._tell(Failed(f"{type(error).__name__}: {error}", isinstance(error, ConfigError)))
        self._split.messages.flush(timeout)

    def _tell(self, message: object) -> None:
        self._split.messages.send(message, self._receivers)


def share_of(batch: Batch, dp: int, dp_size: int) -> Batch:
    """The part of a whole batch that data-parallel rank ``dp`` trains on: contiguous groups, as loaders cut prompts.

    Args:
        batch: samples with ``group`` = index of their prompt in ``batch.prompts``.
    """
    count = len(batch.prompts)
    start, stop = count * dp // dp_size, count * (dp + 1) // dp_size
    members = [index for index, sample in enumerate(batch.samples) if start <= sample.group < stop]
    samples = [copy.copy(batch.samples[index]) for index in members]
    for sample in samples:
        sample.group -= start
    picked = torch.tensor(members, dtype=torch.int64)
    return Batch(
        prompts=batch.prompts[start:stop],
        samples=samples,
        sequences={name: values[picked] for name, values in batch.sequences.items()},
        temperature=batch.temperature,
    )
