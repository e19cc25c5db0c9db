"""`HandedOver`: the training ranks' half of a run with rollout ranks: batches come finished, evaluations are asked for.

It stands in three places of the `TrainingLoop`: as the source, as the first stage (``actor.receive`` pushes the newest
weights and takes the next batch), and as the evaluation. Batch k was sampled with the weights after max(0, k - lag)
steps; under the windowed law a batch is of groups that had finished when it was asked for, and ``lag`` here is 0.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_rl.batch import Batch
from megatron_rl.dataflow import Flow, Stage
from megatron_rl.trainer.inflight.waiting_batches import kept, restored
from megatron_rl.trainer.loop import BatchSource
from megatron_rl.workers import Actor
from megatron_rl.workers.handover import Events, Handed, Order, Start, Stop, TrainingSide
from megatron_rl.workers.prompt_groups.group import oldest_version

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 10.0  # that a run which failed waits for rollout ranks to learn why


class HandedOver:
    """Batches from the rollout ranks.

    Args:
        source: of the prompts, as rollout ranks have it: the run's length and its state in checkpoints.
        step: steps completed.
        total_steps: of the run.
        on_signal: called with a signal that told the rollout ranks to stop.
        on_events: called on rank 0 with the rollout ranks' part of the trace.
        oldest: step of the oldest checkpoint; 0: there is none.
    """

    def __init__(
        self,
        source: BatchSource,
        actor: Actor,
        side: TrainingSide,
        *,
        lag: int,
        step: Callable[[], int],
        total_steps: Callable[[], int],
        on_signal: Callable[[int], object],
        on_events: Callable[[Events], object],
        oldest: Callable[[], int],
    ) -> None:
        self.source, self.actor, self.lag = source, actor, lag
        self._side, self._step, self._total_steps, self._on_signal = side, step, total_steps, on_signal
        self._on_events, self._oldest = on_events, oldest
        self._ordered: int | None = None  # steps completed when the newest order was given
        self._state: Mapping[str, Any] | None = None  # of the source, after the newest batch
        self._kept: dict[str, Any] = {}  # batches that wait for their step, in the checkpoint being written
        self._restored: dict[str, Any] = {}  # those in the checkpoint that was restored
        self._received = time.perf_counter()  # when the newest batch came

    # What the loop takes its batches from

    def next_batch(self) -> Batch:
        """An empty one: `receive` fills it."""
        return Batch()

    @property
    def steps_per_epoch(self) -> int:
        return self.source.steps_per_epoch

    def state_dict(self) -> Mapping[str, Any]:
        state = self.source.state_dict() if self._state is None else self._state
        return {**state, "waiting": self._kept} if self._kept else state

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """While open, `state_dict` holds the batches that were sampled already, too; collective over training ranks,
        which wait for those that are being sampled."""
        if self._ordered is not None:
            last = min(self._ordered + self.lag, self._total_steps() - 1)
            self._kept = kept(self._side.waiting(last - self._step() + 1), self.actor.context)
        try:
            yield
        finally:
            self._kept = {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state)
        self._state = {name: value for name, value in state.items() if name != "waiting"}
        self._restored = dict(state.get("waiting", {}))
        if self._restored:
            self._side.put(restored(self._restored, self.actor.context))
        elif self.lag:
            logger.warning("no batches in flight are in the checkpoint: the next ones are sampled with its weights")

    # The stage

    def receive(self, sampled: Flow) -> Stage:
        """The stage in place of ``sampled``, which rollout ranks run."""
        agreement = self.actor.context.agreement
        return Stage("actor.receive", self._receive, (), sampled.writes, "from rollout ranks", agreement=agreement)

    def _receive(self, batch: Batch) -> None:
        self._side.waited_s = 0.0
        metrics: dict[str, float] = {}
        self._order(metrics)
        handed = self._side.batch()
        assert handed.step == self._step(), f"batch {handed.step} came for step {self._step()}"
        if handed.signal:
            self._on_signal(handed.signal)
        if handed.journalled:
            logger.info("batch %d was finished before the run was resumed: it comes from the journal", handed.step)
        if handed.events:
            self._on_events(handed.events)
        self._state, self.actor.rollouts.seeds.calls = handed.source, handed.calls
        batch.prompts, batch.samples = handed.batch.prompts, handed.batch.samples
        batch.sequences |= handed.batch.sequences
        batch.temperature = handed.batch.temperature
        batch.metrics |= handed.batch.metrics | metrics | self._own_metrics(handed)

    def _own_metrics(self, handed: Handed) -> dict[str, float]:
        now = time.perf_counter()
        step_s, self._received = now - self._received, now
        version = self.actor.policy_version
        ages = [version - oldest_version([sample]) for sample in handed.batch.samples]
        found = {
            "time/wait_for_samples_s": self._side.waited_s,
            "time/training_wait_share": self._side.waited_s / step_s,
        }
        if ages:
            found |= {"rollout/staleness_mean": sum(ages) / len(ages), "rollout/staleness_max": float(max(ages))}
            found |= {f"rollout/staleness_{age}": count / len(ages) for age, count in sorted(Counter(ages).items())}
        return found

    def _order(self, metrics: dict[str, float], evaluate: bool = False) -> None:
        """Let the rollout ranks have the newest weights, and sample what these are for."""
        step = self._step()
        if step == self._ordered and not evaluate:
            return
        weights = self.actor.rollouts.weights
        start = self._start(step) if self._ordered is None else None
        push = weights.needs_push()
        oldest = self._oldest() if self.actor.context.rank == 0 else 0  # that rank gives the order
        self._side.order(Order(step, weights.trained_version, push, evaluate, start, oldest))
        weights.target_facts, self._ordered = self._side.target, step
        if push:
            self.actor.push(metrics)

    def _start(self, step: int) -> Start:
        """Where the rollout ranks begin: behind what waits already."""
        calls = self.actor.rollouts.seeds.calls
        if not self._restored:
            return Start(step, self.state_dict(), calls)
        return Start(step + len(self._side.waiting(0)), self._restored["source"], self._restored["calls"])

    # The evaluation, and the end

    def evaluate(self) -> dict[str, float]:
        """The run's evaluation, on rollout ranks, of the newest weights."""
        self._order({}, evaluate=True)
        return self._side.evaluation()

    @contextlib.contextmanager
    def ending(self, metrics: Callable[[], Mapping[str, float]]) -> Iterator[None]:
        """The rollout ranks end when the body does, and as it does."""
        try:
            yield
        except BaseException as error:
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 0
            signal = 2 if isinstance(error, KeyboardInterrupt) else max(0, code - 128)
            said = "" if signal else f"{type(error).__name__}: {error}"
            with contextlib.suppress(Exception):  # the error above is the one to tell
                self._side.stop(Stop(signal, said), NOTICE_SECONDS)
            raise
        self._side.stop(Stop(metrics=dict(metrics())))
