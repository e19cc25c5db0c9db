"""Trainers in one call each: a model, a tokenizer, a data set, and `train(...)`; one process or torchrun, no change.

    DPOTrainer(model=model, tokenizer=tokenizer, dataset=dataset, beta=0.1, max_length=1024).train(
        num_train_epochs=1, per_device_train_batch_size=2, learning_rate=5e-7, output_dir="./dpo_output")

Everything here is assembled from public parts: a worker, an algorithm, a loader and `Trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megatron_rl.algorithms import DPO, GRPO, KTO, PPO, SFT, BaseAlgorithm, RewardModelling
from megatron_rl.algorithms.roles import LogprobSource
from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.data import (
    CompletionDataset,
    LabelledDataset,
    PairDataset,
    PromptDataset,
    PromptLoader,
    pack_completions,
    pack_pairs,
)
from megatron_rl.data.completions import CompletionLoader
from megatron_rl.data.loader import GlobalBatchLoader
from megatron_rl.data.preferences import PairLoader
from megatron_rl.dataflow import Flow
from megatron_rl.engines.engine_config import LoraConfig
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.rewards import EnvironmentReward, check_answers
from megatron_rl.rollout.base import SamplingParams
from megatron_rl.run.arguments import (
    TrainArguments,
    check_callbacks,
    check_model_and_tokenizer,
    record_of,
    split_options,
)
from megatron_rl.run.evaluation import Evaluation, OfflineEvaluation
from megatron_rl.run.parts import require_group
from megatron_rl.run.training_run import Trainer
from megatron_rl.tracking import TrackerGroup
from megatron_rl.trainer.callbacks import Callback
from megatron_rl.trainer.output_lock import check_writable
from megatron_rl.trainer.refill import filled
from megatron_rl.workers.actor import Actor
from megatron_rl.workers.actor_config import ActorConfig
from megatron_rl.workers.critic import Critic
from megatron_rl.workers.episodes import EnvironmentSource, Episodes
from megatron_rl.workers.job_context import job_context
from megatron_rl.workers.limits import model_limits
from megatron_rl.workers.reference import Reference
from megatron_rl.workers.reference_cache import CachedReference
from megatron_rl.workers.reward_model import RewardModel


class OneCallTrainer:
    """Base class of the one-call trainers.

    Args:
        model: Hugging Face folder, id or model; or Megatron chunks with ``parallel_state`` (and ``optimizer``).
        dataset: a `datasets.Dataset`, a list of dicts, or a path; columns as the data set's Config says.
        eval_dataset: held-out rows in the same columns; None = no evaluation.
        reference_cache: folder in which the reference's log-probabilities of the data are kept: computed once for the
            same weights and rows, then no reference model is held. For algorithms with a reference on fixed data.
        parallel: parallel sizes when there is no ``parallel_state``.
        config: precision, micro-batches and rollouts of the worker: an `Actor.Config`, or its fields by name.
        lora: fields of `LoraConfig`, for example ``{"rank": 8}``: train adapters on frozen weights. The reference is
            then the model without them, and they are merged into the saved model.
        callbacks: `Callback` objects.
        options: fields of the algorithm's Config and of the data set's Config, by name.

    Raises:
        ConfigError: an option that neither Config has, or that cannot work here.
        DataError: the data set lacks columns, or no usable row is left.
    """

    algorithm_type: ClassVar[type[BaseAlgorithm]]
    dataset_type: ClassVar[type[Any]]
    loader_type: ClassVar[type[GlobalBatchLoader[Any]]]
    pack: Callable[[Sequence[Any]], Batch]  # rows to batch, where rows hold responses
    max_tokens: int | None = None  # of an answer, where rows are prompts

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        dataset: Any,
        *,
        eval_dataset: Any = None,
        reference_cache: str | Path | None = None,
        optimizer: Any = None,
        parallel_state: Any = None,
        parallel: ParallelSizes | Mapping[str, Any] | None = None,
        config: ActorConfig | Mapping[str, Any] | None = None,
        lora: LoraConfig | Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> None:
        trainer = type(self).__name__
        check_model_and_tokenizer(model, tokenizer, trainer)
        self.options, of_data = split_options(trainer, options, self.algorithm_type.Config, self.dataset_type.Config)
        columns = self.dataset_type.Config.parse(of_data, where=f"{trainer}, dataset")
        self.config = record_of(ActorConfig, config, f"{trainer}: config") or ActorConfig()
        limits = model_limits(model, tokenizer, self.config, self.max_tokens)
        self.dataset = self.dataset_type(dataset, tokenizer, columns, limits)
        self.held_out = None if eval_dataset is None else self.dataset_type(eval_dataset, tokenizer, columns, limits)
        self.reference_cache = reference_cache
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.parallel_state = parallel_state
        self.parallel = record_of(ParallelSizes, parallel, f"{trainer}: parallel")
        if lora is not None:
            adapters = record_of(LoraConfig, lora, f"{trainer}: lora")
            self.config = self.config.model_copy(update={"lora": adapters})
        self.callbacks = check_callbacks(callbacks, f"{trainer}: callbacks")

    def train(
        self,
        num_train_epochs: float = 1.0,
        per_device_train_batch_size: int = 8,
        learning_rate: float = 1e-6,
        output_dir: str | Path = "outputs/run",
        *,
        max_steps: int | None = None,
        warmup_steps: int = 0,
        evaluate_every: int = 0,
        save_every: int = 0,
        save_at_end: bool = True,
        resume: str = "auto",
        tracking: TrackerGroup.Config | Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Train, and write a Hugging Face folder to ``<output_dir>/hf``. Collective under torchrun.

        Args:
            per_device_train_batch_size: records (prompts, pairs, completions) a step on each data-parallel replica.
            max_steps: steps of the run; None = ``num_train_epochs`` over the data.
            evaluate_every, save_every, save_at_end, resume: as in `TrainerConfig`.

        Returns:
            The newest metrics.

        Raises:
            ConfigError: an argument out of its range, a batch that the algorithm cannot train on, or an output folder
                that cannot be written to.
        """
        given = {name: value for name, value in locals().items() if name in TrainArguments.model_fields}
        arguments = TrainArguments.of(type(self).__name__, given)
        trackers = record_of(TrackerGroup.Config, tracking, f"{type(self).__name__}.train: tracking")
        check_writable(Path(arguments.output_dir))
        algorithm_config = self.algorithm_type.Config.parse(self.options, where=type(self).__name__)
        optimizer = self.config.optimizer.model_copy(
            update={"learning_rate": arguments.learning_rate, "warmup_steps": arguments.warmup_steps}
        )
        run = arguments.trainer_config
        at = job_context(self.parallel_state, self.parallel, self.config.seed)
        per_replica = arguments.per_device_train_batch_size
        self.check_batches(per_replica, at.dp_size)
        loader = self.loader_type(self.dataset, per_replica * at.num_consumers, at, seed=self.config.seed)
        steps = (
            run.total_steps(loader.steps_per_epoch) * algorithm_config.num_epochs * algorithm_config.num_mini_batches
        )
        worker = self.make_worker(at, self.config.model_copy(update={"optimizer": optimizer}).over(steps))
        algorithm = self.make_algorithm(worker)
        trainer = Trainer(
            self.make_flow(worker, algorithm, loader),
            loader,  # type: ignore[arg-type]  # each loader_type has next_batch
            run,
            tracking=trackers,
            evaluate=None if self.held_out is None else self.make_evaluation(worker, algorithm),
            callbacks=self.callbacks,
            params={"trainer": type(self).__name__, **self.plain_options(), **run.model_dump()},
        )
        return trainer.train()

    def plain_options(self) -> dict[str, Any]:
        """The algorithm's options as plain data."""
        config = self.algorithm_type.Config.parse(self.options)
        return config.model_dump(mode="json", include=set(self.options))

    def check_batches(self, per_replica: int, dp_size: int) -> None:
        """Raises ConfigError for batches that the algorithm cannot use; called before any model is loaded."""

    def make_worker(self, context: ParallelContext, config: ActorConfig) -> Any:
        """The model in training: an `Actor`, unless a subclass says otherwise."""
        return Actor(self.model, self.tokenizer, self.optimizer, context=context, config=config)

    def make_algorithm(self, actor: Any) -> BaseAlgorithm:
        """The algorithm over the actor and, where it has a reference, a frozen copy of it."""
        return self.algorithm_type(actor, self.make_reference(actor), config=self.options)

    def make_reference(self, actor: Actor) -> LogprobSource | None:
        if self.options.get("reference_free"):
            return None
        return Reference(actor) if self.reference_cache is None else self.cached_reference(actor, None)

    def cached_reference(self, actor: Actor, fallback: Reference | None) -> CachedReference:
        """The reference's log-probabilities of all rows, training and evaluation."""
        assert self.reference_cache is not None
        data = [self.pack(list(rows)) for rows in (self.dataset, self.held_out) if rows is not None]
        return CachedReference(actor, data, self.reference_cache, fallback)

    def make_evaluation(self, worker: Any, algorithm: Any) -> Callable[[], dict[str, float]]:
        """What `trainer.evaluate` calls."""
        assert self.held_out is not None
        return OfflineEvaluation(algorithm, list(self.held_out), self.pack, worker.context)

    def make_flow(self, actor: Any, algorithm: BaseAlgorithm, loader: Any) -> Flow:
        return algorithm.update()


class DPOTrainer(OneCallTrainer):
    """Preference pairs: columns prompt, chosen, rejected (texts or messages)."""

    algorithm_type, dataset_type, loader_type = DPO, PairDataset, PairLoader
    pack = staticmethod(pack_pairs)


class KTOTrainer(OneCallTrainer):
    """Completions with a binary label: columns prompt, completion, label."""

    algorithm_type, dataset_type, loader_type = KTO, LabelledDataset, CompletionLoader
    pack = staticmethod(pack_completions)

    def check_batches(self, per_replica: int, dp_size: int) -> None:
        if not self.options.get("estimate_kl", True):
            return
        held_out = 2 if self.held_out is None else len(self.held_out) // dp_size
        counts = {"per_device_train_batch_size": per_replica, "rows of eval_dataset a replica": held_out}
        for what, count in counts.items():
            if count < 2:
                raise ConfigError(
                    f"KTOTrainer: {what} = {count}, but the KL is estimated from responses that the completions of a "
                    "replica exchange: give at least 2, or set estimate_kl=False"
                )

    def make_reference(self, actor: Actor) -> LogprobSource | None:
        if self.reference_cache is None or not self.options.get("estimate_kl", True):
            return super().make_reference(actor)
        # Mismatched responses are in no data set: the KL term needs the model.
        return self.cached_reference(actor, Reference(actor))


class SFTTrainer(OneCallTrainer):
    """Supervised fine-tuning: columns prompt, completion; or messages."""

    algorithm_type, dataset_type, loader_type = SFT, CompletionDataset, CompletionLoader
    pack = staticmethod(pack_completions)

    def make_reference(self, actor: Actor) -> LogprobSource | None:
        return None


class RewardTrainer(OneCallTrainer):
    """A reward model from preference pairs: columns as for `DPOTrainer`, optionally a margin (``margin="column"``).

    ``model`` is a language model, whose decoder gets a value head, or a sequence classifier with one label; what is
    saved is such a classifier (`AutoModelForSequenceClassification`), and `RewardModel(folder)` takes it as it is.
    """

    algorithm_type: ClassVar[type[BaseAlgorithm]] = RewardModelling
    dataset_type, loader_type = PairDataset, PairLoader
    pack = staticmethod(pack_pairs)

    def make_worker(self, context: ParallelContext, config: ActorConfig) -> Any:
        return Critic(self.model, self.tokenizer, self.optimizer, context=context, config=config)

    def make_algorithm(self, actor: Any) -> BaseAlgorithm:
        config = {"use_margins": bool(self.dataset.config.margin), "pad_token_id": self.tokenizer.pad_token_id}
        return RewardModelling(actor, config | self.options)


class GRPOTrainer(OneCallTrainer):
    """Prompts and a reward: ``GRPOTrainer(model, tokenizer, dataset, reward=fn, n=8, max_tokens=256)``.

    Args:
        reward: a `RewardModel`, or what makes one: a function of one `Sample`, a `Reward`, a mapping of names to these;
            None = the environment's own.
        environment: each sample is an episode of many turns with this, in evaluation, too: as for `Actor.sample`, for
            example a subclass of `Environment`, or the fields of `EnvironmentConfig` by name. Its rewards are added.
        n, max_tokens, temperature: of sampling; with an environment ``max_tokens`` is that of a turn.

    Raises:
        ConfigError: there is neither a reward nor an environment, or the chat template cannot be used with it.
    """

    algorithm_type: ClassVar[type[BaseAlgorithm]] = GRPO
    dataset_type, loader_type = PromptDataset, PromptLoader

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        dataset: Any,
        *,
        reward: Any = None,
        environment: Episodes | EnvironmentSource | None = None,
        n: int = 8,
        max_tokens: int = 128,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        self.sampling: dict[str, Any] = {"n": n, "max_tokens": max_tokens, "temperature": temperature}
        SamplingParams.parse(self.sampling, where=type(self).__name__)
        require_group(self.algorithm_type, n)
        self.max_tokens = max_tokens
        if reward is None and environment is None:
            raise ConfigError(
                f"{type(self).__name__}: without reward and environment there is nothing to learn from: give reward=, "
                "for example a function of one Sample, or environment="
            )
        super().__init__(model, tokenizer, dataset, **options)
        if not (environment is None or isinstance(environment, Episodes)):
            environment = Episodes(environment, tokenizer)
        self.environment = environment
        source = EnvironmentReward() if reward is None else reward
        self.reward = source if isinstance(source, RewardModel) else RewardModel(source)
        check_answers(self.reward.reward, [*self.dataset, *(self.held_out or ())])

    def make_reference(self, actor: Actor) -> LogprobSource | None:
        return Reference(actor) if self.options.get("kl_coefficient") else None

    def make_evaluation(self, worker: Any, algorithm: Any) -> Callable[[], dict[str, float]]:
        assert self.held_out is not None
        sampling = {name: value for name, value in self.sampling.items() if name not in ("n", "temperature")}
        return Evaluation(worker, list(self.held_out), self.reward.reward, environment=self.environment, **sampling)

    def make_flow(self, actor: Any, algorithm: BaseAlgorithm, loader: Any) -> Flow:
        sample = actor.sample(**self.sampling, environment=self.environment)
        return filled(sample, self.reward.score(), algorithm, loader, actor.context) >> algorithm.update()


class PPOTrainer(GRPOTrainer):
    """As `GRPOTrainer`, with a critic made from ``critic_model`` (None = the actor's, when that is a Hugging Face one),
    or with ``shared_critic=True`` a value head on the actor's own weights.

    Raises:
        ConfigError: the model is Megatron chunks and no critic_model was given.
    """

    algorithm_type = PPO

    def __init__(self, *arguments: Any, critic_model: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.critic_model = critic_model

    def make_worker(self, context: ParallelContext, config: ActorConfig) -> Any:
        shared = bool(self.options.get("shared_critic"))
        return super().make_worker(context, config.model_copy(update={"value_head": shared}))

    def make_algorithm(self, actor: Any) -> BaseAlgorithm:
        if self.options.get("shared_critic"):
            return PPO(actor, self.make_reference(actor), None, self.options)
        source = self.critic_model if self.critic_model is not None else self.model
        if isinstance(source, (list, tuple)):
            raise ConfigError("PPOTrainer over Megatron chunks needs critic_model: a Hugging Face folder, id or model")
        critic = Critic(source, actor.tokenizer, context=actor.context, config=actor.config)
        return PPO(actor, self.make_reference(actor), critic, self.options)
