"""`TrainingLoop`: one step = the next prompts, one call of the flow, metrics; evaluation and checkpoints between.

The trainer knows neither models nor algorithms: it is given a flow, a loader, and the parts whose state a checkpoint
must hold. Every rank runs the same loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_rl.batch import Batch
from megatron_rl.batch.work_time import WorkTime
from megatron_rl.dataflow import Flow
from megatron_rl.parallel import ParallelContext
from megatron_rl.parallel.abandon import Abandoned
from megatron_rl.tracking import Tracker
from megatron_rl.trainer.callbacks import Callback
from megatron_rl.trainer.interruption import Interruption, ended_by
from megatron_rl.trainer.metrics import reduce_metrics
from megatron_rl.trainer.output_lock import OutputLock
from megatron_rl.trainer.timeline import trace_of
from megatron_rl.trainer.trainer_config import TrainerConfig

logger = logging.getLogger(__name__)


class BatchSource(Protocol):
    """The resumable source of the loop's batches."""

    def next_batch(self) -> Batch:
        """This rank's input of the next step."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that one pass over the data takes."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Checkpoints(Protocol):
    """Saves and restores the state of the loop; see `trainer.checkpoint`."""

    def restore(self, trainer: TrainingLoop) -> bool:
        """Load the checkpoint that the config asks for; False for a fresh start."""

    def save(self, trainer: TrainingLoop) -> str:
        """Write a checkpoint of the present step; returns its folder."""

    def remember(self, trainer: TrainingLoop) -> None:
        """A step begins: if it is abandoned, `save` writes the present state."""

    def forget(self) -> None:
        """The step is complete."""

    def poll(self) -> None:
        """Complete checkpoints written in the background; collective, once a step."""

    def finish(self) -> None:
        """Wait until everything is on the disk."""


class TrainingLoop:
    """Runs ``flow`` until the config says that it is enough.

    Args:
        evaluate: returns ``eval/...`` metrics, the same on all ranks; called collectively.
        export: writes the trained model into the given folder; called collectively at the end.
        trackers: receive metrics on rank 0; other ranks pass none.
    """

    def __init__(
        self,
        flow: Flow,
        source: BatchSource,
        context: ParallelContext,
        config: TrainerConfig,
        *,
        checkpoints: Checkpoints | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        export: Callable[[Path], object] | None = None,
        callbacks: Sequence[Callback] = (),
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.flow = flow
        self.source = source
        self.context = context
        self.config = config
        self.checkpoints = checkpoints
        self.evaluate = evaluate
        self.export = export
        self.callbacks = list(callbacks)
        self.trackers = list(trackers)
        self.params: Mapping[str, Any] = {}  # the configuration, for trackers
        self.step = 0  # steps completed
        self.history: dict[str, float] = {}  # the newest metrics
        self.lock: OutputLock | None = None  # of the output folder; released at the end of `train`
        self._stop_reason: str | None = None
        self._trace = trace_of(context, self.output_dir, config.trace)
        self._interruption = Interruption(
            config.grace_seconds, lambda: self._close_trackers("killed"), lost=self._what_is_lost
        )
        self._ended_by = 0  # the signal that all ranks stop for
        self._saved: tuple[int, int | None] = (0, None)  # step and newest evaluation in the newest checkpoint
        self._evaluated_step: int | None = None  # of the newest evaluation

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.total_steps(self.source.steps_per_epoch)

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def stop(self, reason: str) -> None:
        """End the run after the present step. Call it on every rank."""
        self._stop_reason = reason

    def train(self) -> dict[str, float]:
        """Run to the end; returns the newest metrics, evaluation included.

        Raises:
            Exception: what a stage raised; callbacks and trackers were informed.
            KeyboardInterrupt, SystemExit: a signal asked the run to stop; its last step was saved.
        """
        status = "failed"
        try:
            with self._interruption.listening():
                metrics = self._train()
            status = "finished"
            return metrics
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                status = "killed"
            for callback in self.callbacks:
                callback.on_error(self, error)
            raise
        finally:
            self._close_trackers(status)
            if self.lock is not None and status != "finished" and self.step == 0:
                self.lock.discard()
            elif self.lock is not None:
                self.lock.release()

    def _close_trackers(self, status: str) -> None:
        for tracker in self.trackers:
            tracker.close(status)

    def _train(self) -> dict[str, float]:
        resumed = self.checkpoints is not None and self.checkpoints.restore(self)
        for tracker in self.trackers:
            tracker.start(self.step if resumed else None)
            tracker.log_params(self.params)
        if self.context.rank == 0:
            self._trace.start(resumed)
        self._each("on_train_begin")
        logger.info(
            "%s from step %d of %d:\n%s", "resuming" if resumed else "starting", self.step, self.total_steps, self.flow
        )
        if self._evaluation_is_due():  # the first of a fresh run, or one that an interrupted run has missed
            self._track(self._evaluate({}))
        while self.step < self.total_steps and self._stop_reason is None and not self._ended_by:
            try:
                self._one_step()
            except Abandoned as abandoned:
                self._ended_by = abandoned.signal
                logger.info("step %d was given up", self.step + 1)
        self._finish_early()
        if self._stop_reason is not None:
            logger.info("stopped after step %d: %s", self.step, self._stop_reason)
        self._finish()
        return self.history

    def _one_step(self) -> None:
        started = time.perf_counter()
        if self.checkpoints is not None:
            self.checkpoints.remember(self)
        batch = self.source.next_batch()
        self._trace.add(WorkTime.since(started, "next prompts"))
        self._each("on_step_begin", batch)
        self.flow(batch)
        self.step += 1
        if self.checkpoints is not None:
            self.checkpoints.forget()
        batch.metrics["time/step_s"] = time.perf_counter() - started
        self._trace.add(*batch.work)
        reports = self.context.gather_objects((batch.metrics, self._interruption.signal, self._trace.take(self.step)))
        metrics = reduce_metrics([found for found, _, _ in reports])
        self._ended_by = max(number for _, number, _ in reports)
        if self.context.rank == 0:
            self._trace.write([events for _, _, events in reports])
        self._trace.add(WorkTime.since(started + batch.metrics["time/step_s"], "end of step", "waiting"))
        if self.checkpoints is not None:
            self.checkpoints.poll()
        self._each("on_step_end", batch, metrics)
        self.history |= metrics
        line = metrics if self.step % self.config.log_every == 0 else {}
        last = self.step >= self.total_steps or self._stop_reason is not None
        if not self._ended_by and (last or self._evaluation_is_due()):
            line = self._evaluate(line)
        self._track(line)
        if self.config.save_every and self.step % self.config.save_every == 0 and self.step < self.total_steps:
            self._save()

    def _evaluation_is_due(self) -> bool:
        every, step = self.config.evaluate_every, self.step
        due = self.config.evaluate_at_start if step == 0 else bool(every) and step % every == 0
        return due and self._evaluated_step != step

    def _evaluate(self, line: Mapping[str, float]) -> dict[str, float]:
        """``line``, the metrics to be tracked of this step, and those of an evaluation; where this fails, ``line`` is
        tracked all the same."""
        if self.evaluate is None:
            return dict(line)
        started = time.perf_counter()
        try:
            metrics = self.evaluate()
        except Abandoned as abandoned:
            self._ended_by = abandoned.signal
            return dict(line)
        except BaseException:
            self._track(line)
            raise
        took = {"time/evaluation_s": time.perf_counter() - started}
        self._trace.add(WorkTime.since(started, "evaluation"))
        metrics |= reduce_metrics(self.context.gather_objects(took))
        self._each("on_evaluate", metrics)
        self.history |= metrics
        self._evaluated_step = self.step
        return {**line, **metrics}

    def _save(self) -> None:
        state = self.step, self._evaluated_step
        if self.checkpoints is not None and self._saved != state:
            started = time.perf_counter()
            self._each("on_checkpoint", self.checkpoints.save(self))
            self._trace.add(WorkTime.since(started, "checkpoint"))
            self._saved = state

    def _finish_early(self) -> None:
        """Save and end the run, if a signal asked for it.

        Raises:
            KeyboardInterrupt, SystemExit: see `ended_by`.
        """
        if not self._ended_by:
            return
        if self.step > 0:
            self._save()
        if self.checkpoints is not None:
            self.checkpoints.finish()
        again = "the same command starts afresh" if self.step == 0 else "the same command continues from there"
        saved = again if self.checkpoints is not None else "nothing was saved"
        what = f"stopped by signal {self._ended_by} after step {self.step}; {saved}"
        logger.warning("%s", what)
        raise ended_by(self._ended_by, what)

    def _what_is_lost(self) -> str:
        saved = self._saved[0]
        stands = f"the checkpoint of step {saved} stands" if saved else "there is no checkpoint"
        steps = "" if saved == self.step else f"steps {saved + 1} to {self.step} and "
        return f"lost: {steps}the unfinished step {self.step + 1}; {stands}"

    def _finish(self) -> None:
        if self._evaluated_step != self.step:  # a run that was stopped after its last step
            self._track(self._evaluate({}))
            self._finish_early()
        if self.config.save_at_end:
            self._save()
        if self.checkpoints is not None:
            self.checkpoints.finish()
        if self.export is not None and self.config.export:
            self.export(self.output_dir / "hf")
        self._each("on_train_end")

    def _track(self, metrics: Mapping[str, float]) -> None:
        """Called once a step, so that trackers get one line a step."""
        for tracker in self.trackers if metrics else ():
            tracker.log(metrics, self.step)

    def _each(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    # The loop's part of a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The loop's own state: step, data cursor, callbacks."""
        return {
            "step": self.step,
            "evaluated_step": self._evaluated_step,
            "history": dict(self.history),
            "source": dict(self.source.state_dict()),
            "callbacks": {type(c).__name__: dict(c.state_dict()) for c in self.callbacks},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        self._evaluated_step, self.history = state.get("evaluated_step"), dict(state.get("history", {}))
        self._saved = self.step, self._evaluated_step
        self.source.load_state_dict(state["source"])
        for callback in self.callbacks:
            if type(callback).__name__ in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][type(callback).__name__])
