"""`Actor`: the policy. It samples, gives log-probabilities, is trained, and pushes its weights to the rollout engine.

actor = Actor(model="path/or/HF model", tokenizer=tokenizer)
actor = Actor(model=chunks, tokenizer=tokenizer, optimizer=optimizer, parallel_state=parallel_state)
flow = actor.sample(n=8) >> reward.score() >> grpo.update()
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.batch.work_time import WorkTime
from megatron_rl.config import ConfigError
from megatron_rl.data.packing import MicroBatch
from megatron_rl.dataflow import Stage
from megatron_rl.engines.build import build_engine
from megatron_rl.environments import EpisodeError
from megatron_rl.models.tokenizer import align_tokenizer, check_vocabulary
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.rollout.base import RolloutEngine, SamplingParams, WeightCheck
from megatron_rl.workers.actor_config import ActorConfig
from megatron_rl.workers.episodes import EnvironmentSource, Episodes, take_rewards
from megatron_rl.workers.forward_only import forward_only_stage
from megatron_rl.workers.job_context import check_share, role_context
from megatron_rl.workers.loss import LossInputs, LossOutput
from megatron_rl.workers.outputs import Predict, logprob_output, predicted_tokens, value_output
from megatron_rl.workers.prompt_groups.law import LawName
from megatron_rl.workers.rollouts import Rollouts
from megatron_rl.workers.trained_worker import TrainedWorker

logger = logging.getLogger(__name__)

__all__ = ["Actor", "LossInputs", "LossOutput"]


class Actor(TrainedWorker):
    """The policy model in this job's layout, with its optimizer and its rollout engine.

    Args:
        model: a Hugging Face folder, id or model, or a Megatron checkpoint; or a Megatron job's own `GPTModel` chunks,
            bare or in ``Float16Module`` and DistributedDataParallel; or a ready `TrainingEngine`.
        tokenizer: of the model; its pad and eos are aligned with the model.
        optimizer: the job's own, over the parameters of ``model``: Megatron-Core's, for chunks that are wrapped in
            DistributedDataParallel, or one of torch.optim, which Megatron-Core's wrapper for the precision then steps
            and clips (``config.optimizer.clip_gradient``). None builds one from ``config.optimizer``, sharded and
            gathered as the chunks' ``ddp_config`` says.
        parallel_state: ``megatron.core.parallel_state`` of a job that has initialised it; None initialises it from
            ``parallel``.
        parallel: sizes of the parallel axes when there is no ``parallel_state`` yet.
        context: another role's context, in place of both.
        scheduler: Megatron-Core's ``OptimizerParamScheduler``, advanced by 1 with each optimizer step; None: the job's
            own optimizer keeps its learning rate.
        config: everything else: an `Actor.Config`, or its fields by name.
        rollout_engine: a ready one; None builds the one that ``config.rollout`` names on first use.

    Raises:
        ConfigError: layout, model and config do not fit together.
    """

    Config = ActorConfig
    config: ActorConfig

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        optimizer: Any = None,
        parallel_state: Any = None,
        *,
        parallel: ParallelSizes | None = None,
        context: ParallelContext | None = None,
        scheduler: Any = None,
        config: ActorConfig | Mapping[str, Any] | None = None,
        rollout_engine: RolloutEngine | None = None,
    ) -> None:
        config = ActorConfig.of(config, "Actor")
        engine = build_engine(
            model,
            role_context(model, context, parallel_state, parallel, config.seed),
            config,
            name="actor",
            vocab=len(tokenizer),
            optimizer=optimizer,
            scheduler=scheduler,
            shared_value_head=config.value_head,
        )
        super().__init__(engine, config, tokenizer)
        check_vocabulary(tokenizer, engine.architecture.vocab)
        special = align_tokenizer(tokenizer, engine.origin.hf_config, generation=engine.origin.generation)
        self.rollouts = Rollouts(engine, tokenizer, special.eos, config.rollout, config.seed, rollout_engine)

    @property
    def policy_version(self) -> int:
        """Version of the training weights: the number of calls of `optimize` so far, plus other changes that were
        noticed (see `weights_changed`)."""
        return self.rollouts.weights.trained_version

    # Stages

    def sample(
        self,
        n: int | None = None,
        *,
        lag: int = 0,
        law: LawName = "batch",
        parts: int = 1,
        then: Callable[[list[Sample]], object] | None = None,
        environment: Episodes | EnvironmentSource | None = None,
        **sampling: Any,
    ) -> Stage:
        """A stage that generates ``n`` responses for each prompt with the newest weights.

        Args:
            n: samples a prompt; None = ``config.sampling.n``.
            lag: steps by which the weights that sample may be older than those that are trained: rollout ranks
                (``parallel.rollout_ranks``) generate the samples of step k + lag while training ranks take step k.
            law: which samples a step takes, see docs/rollouts_in_flight.md. "batch": those of its own prompts, all from
                the weights ``lag`` steps before. "windowed": groups that have finished, none from weights older than
                that; engines go on with the others while the step is trained and weights are pushed.
            parts: number of parts in which the prompts are generated, one after the other.
            then: called with the samples of each part, on every rank, before the next part is generated; with
                `RewardModel.begin` reward services work on one part while the engine generates the next.
            environment: each sample is an episode of many turns with this: a subclass of `Environment`, a function
                that makes one, its name, or the fields of `EnvironmentConfig`. The stage then writes ``rewards``, too:
                those of the environment, to which `RewardModel.score` adds. ``max_tokens`` is that of a turn.
            sampling: other fields of `SamplingParams`, over ``config.sampling``.
        """
        values = self.config.sampling.model_dump() | sampling | ({} if n is None else {"n": n})
        params = SamplingParams.parse(values, "actor.sample")
        episodes = self.episodes(environment)
        _check_lag(lag, law, episodes is not None, self.context)

        work = functools.partial(self._sample, params=params, parts=parts, then=then, episodes=episodes)
        if law == "windowed":
            work = functools.partial(self._take_finished, params=params, lag=lag, then=then)
        place, split = f"{self.config.rollout.engine} engine TP{self.config.rollout.tp}", self.context.split
        if split is not None:
            place += f" on {split.num_rollout} rollout ranks"
        writes = ("samples",) if episodes is None else ("samples", "rewards")
        stage = Stage("actor.sample", work, ("prompts",), writes, place, may_abandon=True, generates=True, lag=lag)
        return replace(stage, windowed=law == "windowed", agreement=self.context.agreement)

    def _sample(
        self,
        batch: Batch,
        params: SamplingParams,
        parts: int,
        then: Callable[[list[Sample]], object] | None,
        episodes: Episodes | None,
    ) -> None:
        """Samples of the batch's prompts, in ``parts`` parts."""
        if batch.share is not None:
            check_share(batch.share, self.context)
        started = time.perf_counter()
        if self.publish(batch.metrics):
            batch.work.append(WorkTime.since(started, "push", "engine"))
        batch.samples = []
        size = max(1, -(-len(batch.prompts) // parts))
        seeds = self.rollouts.seeds.training(batch.prompts)
        for start in range(0, max(1, len(batch.prompts)), size):
            part = slice(start, start + size)
            made = self._generate(batch.prompts[part], params, seeds[part], episodes)
            for sample in made:
                sample.group += start
            batch.samples += made
            if then is not None:
                then(made)
        self.rollouts.after_sampling()
        self._describe(batch, params)
        if episodes is not None:
            take_rewards(batch, episodes)

    def _take_finished(
        self, batch: Batch, params: SamplingParams, lag: int, then: Callable[[list[Sample]], object] | None
    ) -> None:
        """Under the windowed law: finished groups in place of the batch's prompts, which are drawn."""
        self.rollouts.take_finished(batch, params, lag)
        self._describe(batch, params)
        if then is not None:
            then(batch.samples)

    def _describe(self, batch: Batch, params: SamplingParams) -> None:
        """What a flow, a trace and metrics know of the samples beside themselves."""
        batch.work += self.rollouts.take_work()
        batch.temperature = params.temperature or 1.0
        batch.metrics.update(_sample_metrics(batch.samples))

    def episodes(self, environment: Episodes | EnvironmentSource | None) -> Episodes | None:
        """What `sample` plays with ``environment``."""
        if environment is None or isinstance(environment, Episodes):
            return environment
        return Episodes(environment, self.tokenizer)

    def _generate(
        self, prompts: list[Prompt], params: SamplingParams, seeds: list[int], episodes: Episodes | None
    ) -> list[Sample]:
        if episodes is None:
            return self.rollouts.generate(prompts, params, seeds)
        with self.context.agreement.attempt("actor.sample"):  # an environment fails for one replica alone
            samples = self.rollouts.generate(prompts, params, seeds, episodes)
            if prompts and not samples:
                raise EpisodeError(f"all episodes of {len(prompts)} prompts were lost: {episodes.last_lost}")
        return samples

    def logprobs(self, write: str = "old_logprobs") -> Stage:
        """A stage that writes log-probabilities of the response's tokens under the training weights, fp32
        ``[num_tokens]``; of all tokens where the batch has no ``response_mask``."""
        return forward_only_stage("actor.logprobs", self.engine, logprob_output, write)

    def values(self, write: str = "values") -> Stage:
        """A stage that writes the values of a critic on shared weights, as `Critic.values`.

        Raises:
            ConfigError: the model has no value head.
        """
        if not self.engine.shared_value_head:
            raise ConfigError(
                "a critic on the actor's weights needs actor.value_head=true, and a model that the Actor builds itself"
            )
        return forward_only_stage("actor.values", self.engine, value_output, write)

    # Work

    def predictor(self, batch: Batch, with_entropy: bool) -> Predict:
        """Log-probabilities, and entropies where the loss reads them."""
        engine = self.engine
        predicted = predicted_tokens(engine, batch, batch.temperature, with_entropy)

        def predict(micro_batch: MicroBatch, hidden: Tensor) -> dict[str, Tensor | None]:
            logprobs, entropy = predicted(micro_batch, hidden)
            values = {"values": engine.values(hidden)} if engine.shared_value_head else {}
            return {"logprobs": logprobs, "entropy": entropy} | values

        return predict

    def weights_changed(self) -> None:
        """As `TrainedWorker.weights_changed`; the next `sample` pushes the weights as a new version.

        `sample` also detects changes itself, by checksums: one pass over the weights when no change is known.
        """
        super().weights_changed()
        self._weights_stepped()

    def _weights_stepped(self) -> None:
        self.rollouts.weights.trained_version += 1

    def publish(self, metrics: dict[str, float] | None = None) -> bool:
        """Push the weights to the rollout engine if it does not have the newest ones yet; whether it was so.
        Collective. Where the job has rollout ranks, `Trainer` pushes, and nothing happens here."""
        outdated = self.context.split is None and self.rollouts.weights.needs_push()
        if outdated:
            self.push(metrics)
        return outdated

    def push(self, metrics: dict[str, float] | None = None) -> None:
        """Push the weights to the rollout engine. Collective; on rollout ranks it takes its part of another's push."""
        self._follow_weights()
        started = time.perf_counter()
        self.engine.sync_parameters()
        report = self.rollouts.weights.push()
        if metrics is not None:
            metrics["time/weight_sync_s"] = time.perf_counter() - started
            metrics["weight_sync/wire_bytes"] = float(report.transfer.sent_bytes)

    def generate(self, prompts: list[Prompt], environment: Episodes | None = None, **sampling: Any) -> list[Sample]:
        """Samples outside a flow, for evaluation: greedy unless ``sampling`` says otherwise."""
        values = self.config.sampling.model_dump() | {"n": 1, "temperature": 0.0} | sampling
        self.publish()
        seeds = self.rollouts.seeds.evaluation(prompts)
        return self._generate(prompts, SamplingParams.parse(values, "actor.generate"), seeds, environment)

    def verify_weights(self) -> WeightCheck:
        """Check that the rollout engines still hold the pushed weights, and that the training weights are still those,
        unless newer ones are known; collective over all ranks."""
        return self.rollouts.weights.verify()

    def close(self) -> None:
        """Release the rollout engine."""
        self.rollouts.close()


def _check_lag(lag: int, law: LawName, has_episodes: bool, context: ParallelContext) -> None:
    if law == "windowed" and (lag < 1 or has_episodes):
        raise ConfigError(
            "actor.sample(law='windowed') lets groups stay in flight over steps: it needs lag=1 or more, and knows no "
            "episodes (environment=) yet; law='batch' has both"
        )
    if lag < 0 or (lag and context.split is None):
        raise ConfigError(
            f"actor.sample(lag={lag}): a lag is 0 or more, and above 0 needs rollout ranks, which sample while others "
            "train: set parallel.rollout_ranks"
        )


def _sample_metrics(samples: list[Sample]) -> dict[str, float]:
    if not samples:
        return {}
    lengths = torch.tensor([len(sample.response_ids) for sample in samples], dtype=torch.float32)
    truncated = sum(sample.truncated for sample in samples)
    return {
        "rollout/response_tokens_mean": float(lengths.mean()),
        "rollout/response_tokens_max": float(lengths.max()),
        "rollout/truncated_fraction": truncated / len(samples),
    }
