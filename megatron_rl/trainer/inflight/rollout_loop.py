"""`RolloutLoop`: what a rollout rank does in a run: it obeys the training ranks' orders.

    for each order:  [take the weights of version v]  [evaluate]  sample what v is for, and hand it over

Law *batch*: with lag L, batch j is sampled with the weights after max(0, j - L) steps; so the first order, after 0
steps, is for the batches 0 to L, and each later one for one batch. With the same seeds and L = 0 these are the batches
of a run without rollout ranks. Finished batches go to the journal: a run that is killed and resumed samples none again.

Law *windowed*: an order is for one batch, of whichever groups have finished; engines go on with others meanwhile, also
while weights are pushed. A resumed run draws the groups again that were in flight.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_rl.batch import Batch, Prompt
from megatron_rl.batch.record_bytes import from_bytes, to_bytes
from megatron_rl.batch.work_time import WorkTime
from megatron_rl.dataflow import Flow
from megatron_rl.parallel.abandon import Abandoned
from megatron_rl.parallel.agreement import PeerError, TransportError
from megatron_rl.trainer.inflight.batch_journal import BatchJournal, FinishedBatch
from megatron_rl.trainer.interruption import Interruption, ended_by
from megatron_rl.trainer.loop import BatchSource
from megatron_rl.trainer.metrics import reduce_metrics
from megatron_rl.trainer.timeline import Trace
from megatron_rl.weights.fingerprint import Fingerprint
from megatron_rl.weights.target import TargetFacts
from megatron_rl.workers import Actor
from megatron_rl.workers.handover import Events, Order, RolloutSide, Stop

logger = logging.getLogger(__name__)

JOURNALLED = 256  # batches that a journal keeps at the least, and at most twice as many, where checkpoints are rare
IN_FLIGHT = "in_flight"  # in the state of the prompts: those that are drawn and not yet handed over
NOTICE_SECONDS = 30.0  # that a run which failed waits for training ranks to learn why


class RolloutLoop:
    """Runs ``flow``, the stages of rollout ranks, on the batches of ``source``.

    Args:
        evaluate: as of `TrainingLoop`.
        total_steps: of the run.
        journals: their folder.
        description: of everything beside weights and prompts that decides what is sampled and how it is scored; "":
            not known, and then there is no journal.
    """

    def __init__(
        self,
        flow: Flow,
        source: BatchSource,
        actor: Actor,
        side: RolloutSide,
        *,
        evaluate: Callable[[], dict[str, float]] | None,
        total_steps: int,
        interruption: Interruption,
        trace: Trace,
        journals: Path,
        description: str,
    ) -> None:
        self.flow, self.source, self.actor = flow, source, actor
        self._side, self._evaluate, self._interruption = side, evaluate, interruption
        self.total_steps = total_steps
        self._drawn_before: list[Prompt] = []  # for the first batch of a windowed run
        self.next_batch = 0
        self._trace, self._journals, self._description = trace, journals, description
        self._journal: BatchJournal | None = None
        self._fingerprint, self._weights = Fingerprint(), b""  # checksums of the engines' weights

    def run(self) -> dict[str, float]:
        """Until the training ranks end; returns the run's newest metrics.

        Raises:
            PeerError: the training ranks failed.
            KeyboardInterrupt, SystemExit: a signal ended the run.
        """
        with self._interruption.listening():
            try:
                self.actor.rollouts.engine  # noqa: B018  servers start while training ranks load
                while isinstance(order := self._side.order(), Order):
                    self._obey(order)
            except TransportError as error:
                if self._interruption.signal:
                    raise ended_by(self._interruption.signal, f"stopped by a signal: {error}") from None
                self._say(error)
                raise
            except Exception as error:
                self._say(error)
                raise
            finally:
                self.actor.close()
        return _end(order)

    def _say(self, error: Exception) -> None:
        try:
            self._side.failed(error, NOTICE_SECONDS)
        except Exception:  # the error itself says more
            logger.exception("the training ranks could not be told")

    def _obey(self, order: Order) -> None:
        if order.start is not None:
            self.next_batch, self.actor.rollouts.seeds.calls = order.start.step, order.start.calls
            self.source.load_state_dict(order.start.source)
            self._restore(order.start.source.get(IN_FLIGHT))
            self._open_journal()
        if self._journal is not None:
            # In large portions: each rewrites the file.
            self._journal.drop_before(max(order.oldest, (order.step // JOURNALLED - 1) * JOURNALLED))
        self._side.ready(TargetFacts.of(self.actor.rollouts.engine))
        started = time.perf_counter()
        if order.push:
            self.actor.rollouts.weights.trained_version = order.version
            self.actor.push()
            self._trace.add(WorkTime.since(started, "push", "engine"))
            self._weights = self._checksums() if self._journal is not None else b""
        self._side.waited_s += time.perf_counter() - started
        try:
            if order.evaluate:
                self._side.evaluated(self._evaluate() if self._evaluate is not None else {})
            while self.next_batch <= min(order.step + self.flow.batches_ahead, self.total_steps - 1):
                self._sample()
            groups = self.actor.rollouts.in_flight
            if groups is not None and self.next_batch < self.total_steps:
                groups.start()
        except Abandoned as abandoned:
            self._side.gave_up(abandoned.signal)

    def _open_journal(self) -> None:
        """Where engines live in this process; of others it is not known whether a resumed run serves the same weights
        again."""
        context, split = self.actor.context, self.actor.context.split
        assert split is not None
        with context.attempt("the journal"):
            if self._description and not self.flow.windowed and self.actor.rollouts.engine.targets():
                self._journal = BatchJournal(self._journals, split.rank, split.rollout_ranks)

    def _checksums(self) -> bytes:
        own = sorted(self._fingerprint(self.actor.rollouts.engine.targets()).items())
        return to_bytes(self.actor.context.gather_objects(own))

    def _journalled(self, origin: str) -> FinishedBatch | None:
        """The next batch, where all rollout ranks have it in their journals."""
        if self._journal is None:
            return None
        found = self._journal.find(self.next_batch, origin)
        return found if all(self.actor.context.gather_objects(found is not None)) else None

    def _origin(self) -> str:
        """Digest of what decides the next batch; "" where there is no journal."""
        if self._journal is None:
            return ""
        at = (self.next_batch, dict(self.source.state_dict()), self.actor.rollouts.seeds.calls)
        return xxhash.xxh3_128_hexdigest(to_bytes((self._description, self._weights, *at)))

    def _hand_over(self, finished: FinishedBatch, signal: int, journalled: bool, events: Events) -> None:
        batch, metrics, source, calls = finished.batch, finished.metrics, finished.source, finished.calls
        self._side.hand_over(finished.step, batch, metrics, source, calls, signal, journalled, events)
        self.next_batch += 1

    def _restore(self, in_flight: bytes | None) -> None:
        """The prompts of groups that were in flight when the run's checkpoint was taken."""
        if in_flight and not self.flow.windowed:
            logger.warning("the prompts that were in flight in the checkpoint, under the windowed law, are left out")
        elif in_flight:
            self._drawn_before = list(from_bytes(in_flight))

    def _next_batch(self) -> Batch:
        """The first one of a windowed run has the prompts of ``lag`` more steps."""
        batch = self.source.next_batch()
        if self.flow.windowed and self.actor.rollouts.in_flight is None:
            own = batch.prompts
            later = [self.source.next_batch().prompts for _ in range(0 if self._drawn_before else self.flow.lag)]
            batch.prompts = [*self._drawn_before, *own, *itertools.chain(*later)]
        return batch

    def _state(self) -> Mapping[str, Any]:
        """Of the prompts, after the batch that was just sampled."""
        state, groups = self.source.state_dict(), self.actor.rollouts.in_flight
        return state if groups is None else {**state, IN_FLIGHT: to_bytes(groups.prompts)}

    def _sample(self) -> None:
        origin = self._origin()
        if (finished := self._journalled(origin)) is not None:
            self.source.load_state_dict(finished.source)
            self.actor.rollouts.seeds.calls = finished.calls
            self._hand_over(finished, max(self.actor.context.gather_objects(self._interruption.signal)), True, ())
            return
        waited, self._side.waited_s = self._side.waited_s, 0.0
        started = time.perf_counter()
        self._trace.add(WorkTime("training ranks", started - waited, waited, "waiting"))
        batch = self._next_batch()
        self.flow(batch)
        took = time.perf_counter() - started
        batch.metrics |= _speed(batch, took, waited, len(self.actor.rollouts.placement.replicas))
        self._trace.add(*batch.work)
        events = self._trace.take(self.next_batch + 1)
        reports = self.actor.context.gather_objects((batch.metrics, self._interruption.signal, events))
        metrics = reduce_metrics([found for found, _, _ in reports])
        signal = max(number for _, number, _ in reports)
        state, calls = self._state(), self.actor.rollouts.seeds.calls
        finished = FinishedBatch(self.next_batch, origin, batch, metrics, state, calls)
        if self._journal is not None:
            self._journal.add(finished)
        self._hand_over(finished, signal, False, [found for _, _, found in reports])


def _speed(batch: Batch, took: float, waited: float, num_engines: int) -> dict[str, float]:
    tokens = sum(len(sample.response_ids) for sample in batch.samples)
    idle = batch.metrics.pop("time/engine_idle_s", waited)  # of groups in flight, which take no notice of steps
    return {
        "time/wait_for_weights_s": waited,
        "time/engine_wait_share": idle / (waited + took),
        "time/tokens_per_s_per_engine": tokens / max(waited + took - idle, 1e-6) / num_engines,
    }


def _end(stop: Stop) -> dict[str, float]:
    if stop.signal:
        raise ended_by(stop.signal, f"stopped by signal {stop.signal}")
    if stop.error:
        raise PeerError(f"on the training ranks, {stop.error}")
    return dict(stop.metrics)
