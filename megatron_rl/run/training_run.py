"""`Trainer`: a flow and its data as a run, with checkpoints, tracking and a reward curve.

`build_trainer` ends with it, and a job that builds its parts in Python starts with it:

    flow = actor.sample(n=8) >> reward.score() >> grpo.update()
    Trainer(flow, loader, num_steps=100).train()
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from megatron_rl.algorithms import BaseAlgorithm
from megatron_rl.config import ConfigError, masked_values
from megatron_rl.data import GlobalBatchLoader, Limits
from megatron_rl.data.dataset import TokenisedDataset
from megatron_rl.dataflow import Flow
from megatron_rl.devices import current_platform
from megatron_rl.run.report import RewardCurve
from megatron_rl.tracking import TrackerGroup, build_tracker
from megatron_rl.trainer.callbacks import Callback
from megatron_rl.trainer.checkpoint import DistributedCheckpoints, Stateful
from megatron_rl.trainer.inflight.handed_over import HandedOver
from megatron_rl.trainer.inflight.rollout_loop import RolloutLoop
from megatron_rl.trainer.loop import BatchSource, TrainingLoop
from megatron_rl.trainer.output_lock import OutputLock
from megatron_rl.trainer.retention import complete_checkpoints, step_of
from megatron_rl.trainer.trainer_config import TrainerConfig
from megatron_rl.workers import Actor, Critic
from megatron_rl.workers.handover import RolloutSide, TrainingSide
from megatron_rl.workers.job_context import check_share
from megatron_rl.workers.trained_worker import TrainedWorker

logger = logging.getLogger(__name__)


class Trainer(TrainingLoop):
    """Runs ``flow``; its algorithm and models are found in it. Collective over all ranks: the output folder is made.

    In a job with rollout ranks (``parallel.rollout_ranks``) every rank makes the same `Trainer`; rollout ranks run the
    flow's first stages and the evaluation, training ranks the rest, callbacks included.

    Args:
        source: what each step's batch comes from, for example a `PromptLoader`.
        config: length, checkpoints and outputs of the run; ``overrides`` are fields of it by name.
        tracking: where metrics go; None = console, metrics.jsonl and MLflow.
        evaluate: ``eval/...`` metrics, for example an `Evaluation`.
        params: the configuration, for trackers and for ``config.yaml`` in the output folder.

    Raises:
        ConfigError: no algorithm, or several, update weights in the flow; a tracker is unknown or not installed;
            another run uses the output folder; ``source`` was made for another data-parallel rank.
        DataError: the model cannot take a record of the source: token ids, or length.
    """

    def __init__(
        self,
        flow: Flow,
        source: BatchSource,
        config: TrainerConfig | None = None,
        *,
        tracking: TrackerGroup.Config | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        callbacks: Sequence[Callback] = (),
        params: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        config = config or TrainerConfig()
        if overrides:
            config = TrainerConfig.parse(config.model_dump() | overrides, "Trainer")
        algorithm = algorithm_of(flow)
        model = cast(Actor | Critic, algorithm.actor)  # the trained model: a critic when a reward model is trained
        output_dir, context = Path(config.output_dir), model.context
        _check_data(source, model)
        self._rollouts: RolloutLoop | None = None  # on rollout ranks
        self._handed: HandedOver | None = None  # on training ranks beside them
        if context.split is not None:
            sampled, trained = flow.split()
            if context.split.on_rollout:
                super().__init__(sampled, source, context, config)
                self._rollouts = self._rollout_loop(cast(Actor, model), evaluate, params)
                return
            logger.info("the flow:\n%s", flow)
            self._handed = self._handed_over(source, cast(Actor, model), flow.batches_ahead)
            flow, source = self._handed.receive(sampled) >> trained, self._handed
            evaluate = self._handed.evaluate if evaluate is not None else None
        lock = OutputLock(output_dir, context)
        super().__init__(
            flow,
            source,
            context,
            config,
            checkpoints=_checkpoints(model, algorithm, config),
            evaluate=evaluate,
            export=lambda folder: _export(model, algorithm, folder),
            callbacks=callbacks,
        )
        self.lock = lock
        try:
            tracker = build_tracker(tracking or TrackerGroup.Config(), output_dir, context.rank, self.total_steps)
        except BaseException:
            lock.discard()
            raise
        self.params = masked_values(dict(params or {}))
        if context.rank == 0:
            (output_dir / "config.yaml").write_text(yaml.safe_dump(self.params, sort_keys=False))
        self.trackers.append(tracker)
        self.callbacks.append(RewardCurve(output_dir, tracker))
        logger.info("%s, %s; outputs in %s", current_platform().name, context, output_dir)

    def _handed_over(self, source: BatchSource, actor: Actor, lag: int) -> HandedOver:
        assert actor.context.split is not None
        return HandedOver(
            source,
            actor,
            TrainingSide(actor.context.split),
            lag=lag,
            step=lambda: self.step,
            total_steps=lambda: self.total_steps,
            on_signal=lambda number: self._interruption.hear(number),
            on_events=lambda events: self._trace.write(events),
            oldest=lambda: min(map(step_of, complete_checkpoints(self.output_dir / "checkpoints")), default=0),
        )

    def _rollout_loop(
        self, actor: Actor, evaluate: Callable[[], dict[str, float]] | None, params: Mapping[str, Any] | None
    ) -> RolloutLoop:
        assert actor.context.split is not None
        return RolloutLoop(
            self.flow,
            self.source,
            actor,
            RolloutSide(actor.context.split),
            evaluate=evaluate,
            total_steps=self.total_steps,
            interruption=self._interruption,
            trace=self._trace,
            journals=self.output_dir / "journal",
            description=_description(params),
        )

    def _save(self) -> None:
        with self._handed.keeping() if self._handed is not None else contextlib.nullcontext():
            super()._save()

    def train(self) -> dict[str, float]:
        """As `TrainingLoop.train`, on all ranks of the job; rollout ranks return the same metrics."""
        if self._rollouts is not None:
            return self._rollouts.run()
        with self._handed.ending(lambda: self.history) if self._handed is not None else contextlib.nullcontext():
            return super().train()


def _description(params: Mapping[str, Any] | None) -> str:
    """Of a run's configuration, what decides about samples and their rewards; "" where it is not known."""
    other = ("trainer", "tracking", "log_level", "callbacks", "evaluation", "parallel")
    values = {name: value for name, value in (params or {}).items() if name not in other}
    return yaml.safe_dump(values, sort_keys=True) if values else ""


def algorithm_of(flow: Flow) -> BaseAlgorithm:
    """The algorithm whose update the flow holds.

    Raises:
        ConfigError: there is none, or there are several.
    """
    found = list(
        {id(stage.part): stage.part for stage in flow.stages if isinstance(stage.part, BaseAlgorithm)}.values()
    )
    if len(found) != 1:
        names = ", ".join(algorithm.name for algorithm in found) or "none"
        raise ConfigError(
            f"a run trains with one algorithm, but the flow holds {names}: end it with one update(), as in "
            "actor.sample() >> reward.score() >> grpo.update()"
        )
    return found[0]


def _check_data(source: BatchSource, actor: Actor | Critic) -> None:
    if isinstance(source, GlobalBatchLoader):
        check_share((source.dp_rank, source.dp_size), actor.context)
    dataset = source.dataset if isinstance(source, GlobalBatchLoader) else None
    if isinstance(dataset, TokenisedDataset):
        architecture = actor.engine.architecture
        dataset.check(Limits(architecture.vocab or None, architecture.max_positions))


def _export(actor: Actor | Critic, algorithm: BaseAlgorithm, folder: Path) -> None:
    """Export the trained model, and a critic with weights of its own to a folder next to it."""
    actor.save_pretrained(folder, overwrite=True)
    if isinstance(algorithm.critic, Critic) and algorithm.critic is not actor:
        algorithm.critic.save_pretrained(folder.with_name(f"{folder.name}_critic"), overwrite=True)


def _checkpoints(actor: Actor | Critic, algorithm: BaseAlgorithm, config: TrainerConfig) -> DistributedCheckpoints:
    trained: dict[str, TrainedWorker] = {"actor": actor}
    states: dict[str, Stateful] = {"algorithm": algorithm}
    if isinstance(actor, Actor):
        states["rollouts"] = actor.rollouts
    if isinstance(algorithm.critic, Critic):
        trained["critic"] = algorithm.critic
    return DistributedCheckpoints(
        Path(config.output_dir) / "checkpoints",
        actor.context,
        trained,
        states,
        resume=config.resume,
        keep_last=config.keep_last,
        asynchronous=config.async_save,
        describe=actor.describe_into,
        verify=config.verify_checkpoints,
    )
