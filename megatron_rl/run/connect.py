"""`connect`: a flow, its parts and its data become a `Trainer` with checkpoints, tracking and a reward curve.

This is the last step of `build_trainer`, and the way in for a job that has made its parts in Python:

    flow = actor.sample(n=8) >> reward.score() >> grpo.update()
    connect(flow, actor, grpo, loader, TrainerSettings(num_steps=100)).train()
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.algorithms import BaseAlgorithm
from megatron_rl.config import masked_values
from megatron_rl.data import GlobalBatchLoader, Limits
from megatron_rl.data.dataset import TokenisedDataset
from megatron_rl.dataflow import Flow
from megatron_rl.devices import current_platform
from megatron_rl.run.report import RewardCurve
from megatron_rl.tracking import TrackerGroup, build_tracker
from megatron_rl.trainer.callbacks import Callback
from megatron_rl.trainer.checkpoint import DistributedCheckpoints, Stateful
from megatron_rl.trainer.loop import BatchSource, Trainer
from megatron_rl.trainer.output_lock import OutputLock
from megatron_rl.trainer.settings import TrainerSettings
from megatron_rl.workers import Actor, Critic
from megatron_rl.workers.assembly import check_share

logger = logging.getLogger(__name__)


def connect(
    flow: Flow,
    actor: Actor | Critic,
    algorithm: BaseAlgorithm,
    source: BatchSource,
    settings: TrainerSettings,
    *,
    tracking: TrackerGroup.Config | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    callbacks: Sequence[Callback] = (),
    params: Mapping[str, Any] | None = None,
) -> Trainer:
    """Connect the parts of a run; the output folder is made here. Collective over all ranks.

    Args:
        actor: the model that the run is about; a `Critic` where a reward model is trained.
        source: what each step's batch comes from, for example a `PromptLoader`.
        tracking: where metrics go; None = console, metrics.jsonl and MLflow.
        evaluate: ``eval/...`` metrics, for example an `Evaluation`.
        params: the configuration, for trackers and for ``config.yaml`` in the output folder.

    Raises:
        ConfigError: a tracker is unknown or not installed; another run uses the output folder; ``source`` gives this
            rank another share of the data than its data-parallel place.
        DataError: the model cannot take a record of the source: token ids, or length.
    """
    _check_data(source, actor)
    output_dir = Path(settings.output_dir)
    lock = OutputLock(output_dir, actor.context)
    trainer = Trainer(
        flow,
        source,
        actor.context,
        settings,
        checkpoints=_checkpoints(actor, algorithm, settings),
        evaluate=evaluate,
        export=lambda folder: _export(actor, algorithm, folder),
        callbacks=callbacks,
    )
    trainer.lock = lock
    try:
        tracker = build_tracker(tracking or TrackerGroup.Config(), output_dir, actor.context.rank, trainer.total_steps)
    except BaseException:
        lock.discard()
        raise
    if actor.context.rank == 0:
        (output_dir / "config.yaml").write_text(yaml.safe_dump(masked_values(dict(params or {})), sort_keys=False))
    trainer.trackers.append(tracker)
    trainer.params = masked_values(params or {})
    trainer.callbacks.append(RewardCurve(output_dir, tracker))
    logger.info("%s, %s; outputs in %s", current_platform().name, actor.context, output_dir)
    return trainer


def _check_data(source: BatchSource, actor: Actor | Critic) -> None:
    if isinstance(source, GlobalBatchLoader):
        check_share((source.dp_rank, source.dp_size), actor.context)
    dataset = source.dataset if isinstance(source, GlobalBatchLoader) else None
    if isinstance(dataset, TokenisedDataset):
        architecture = actor.model.architecture
        dataset.check(Limits(architecture.vocab or None, architecture.max_positions))


def _export(actor: Actor | Critic, algorithm: BaseAlgorithm, folder: Path) -> None:
    """The model that the run is about, and beside its folder that of a critic with weights of its own."""
    actor.save_pretrained(folder, overwrite=True)
    if isinstance(algorithm.critic, Critic) and algorithm.critic is not actor:
        algorithm.critic.save_pretrained(folder.with_name(f"{folder.name}_critic"), overwrite=True)


def _checkpoints(actor: Actor | Critic, algorithm: BaseAlgorithm, settings: TrainerSettings) -> DistributedCheckpoints:
    trainables = {"actor": actor.trainable}
    states: dict[str, Stateful] = {"algorithm": algorithm}
    if isinstance(actor, Actor):
        states["rollouts"] = actor.rollouts
    if isinstance(algorithm.critic, Critic):
        trainables["critic"] = algorithm.critic.trainable
    return DistributedCheckpoints(
        Path(settings.output_dir) / "checkpoints",
        actor.context,
        trainables,
        states,
        resume=settings.resume,
        keep_last=settings.keep_last,
        asynchronous=settings.async_save,
        describe=actor.describe_into,
    )
