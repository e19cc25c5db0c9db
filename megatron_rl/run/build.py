"""From a `RunConfig` to a `Trainer`: every part is built and checked before anything is written.

Order matters for good errors: data, rewards and callbacks (which touch no device) come before the model, and the output
folder comes last, so that a run that cannot start leaves nothing behind.
"""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_rl.algorithms import ALGORITHMS, BaseAlgorithm
from megatron_rl.config import USER_CODE, ConfigError, load_user_object
from megatron_rl.data import PromptDataset, PromptLoader
from megatron_rl.engines.build import size_of
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.parallel import ParallelContext
from megatron_rl.rewards import Reward, build_reward, check_answers
from megatron_rl.rollout import ENGINES
from megatron_rl.run.evaluation import Evaluation
from megatron_rl.run.parts import check_layout, check_parts, rewards_of, unused_parts, uses_reference
from megatron_rl.run.run_config import RunConfig
from megatron_rl.run.training_run import Trainer
from megatron_rl.trainer.callbacks import Callback
from megatron_rl.trainer.output_lock import check_writable
from megatron_rl.trainer.refill import filled
from megatron_rl.trainer.restart_point import find_checkpoint
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_rl.workers import Actor, Critic, Reference, RewardModel
from megatron_rl.workers.episodes import Episodes
from megatron_rl.workers.limits import model_limits

logger = logging.getLogger(__name__)


def build_trainer(config: RunConfig) -> Trainer:
    """Every part of the run, connected. Collective over all ranks.

    Raises:
        ConfigError, DataError: the configuration or the data cannot be used; the same error on every rank.
    """
    check_writable(Path(config.trainer.output_dir))
    algorithm_type, algorithm_config = find_algorithm(config)
    check_parts(config, algorithm_type, algorithm_config)
    check_engine(config)
    checkpoint_folder = Path(config.trainer.output_dir) / "checkpoints"
    find_checkpoint(checkpoint_folder, config.trainer.resume)
    model = starting_model(config)
    described = model.tokenizer_folder if isinstance(model, MegatronCheckpoint) else model
    size_of(model, 0)  # before the tokenizer, which reads config.json too and would report its errors as its own
    tokenizer = load_tokenizer(config.tokenizer or described, config.pad_token)
    limits = model_limits(model, tokenizer, config.actor, config.actor.sampling.max_tokens)
    prompts = PromptDataset(None, tokenizer, config.data, limits)
    held_out = PromptDataset(None, tokenizer, config.evaluation.data, limits) if config.evaluation else None
    reward = build_reward(rewards_of(config))
    episodes = Episodes(config.environment, tokenizer) if config.environment else None
    check_answers(reward, [*prompts, *(held_out or ())])
    callbacks = [load_callback(name) for name in config.callbacks]
    for line in unused_parts(config, algorithm_type, algorithm_config):
        logger.warning("%s", line)
    context = ParallelContext.create(config.parallel, seed=config.seed)
    check_layout(config, context.world_size if context.split is None else context.split.world_size)
    loader = PromptLoader(prompts, config.prompts_per_step, context, seed=config.seed, shuffle=config.shuffle)

    steps = config.trainer.total_steps(loader.steps_per_epoch)
    steps *= algorithm_config.num_epochs * algorithm_config.num_mini_batches
    actor = build_actor(config, context, tokenizer, num_optimizer_steps=steps)
    critic = _critic(config, actor, num_optimizer_steps=steps)
    reference = _reference(config, actor) if uses_reference(config, algorithm_type, algorithm_config) else None
    algorithm = algorithm_type(actor, reference, critic, algorithm_config)
    reward_model = RewardModel(reward)
    parts, begin = config.rollout_parts, reward_model.begin if config.rollout_parts > 1 else None
    sample = actor.sample(lag=config.rollout_lag, law=config.rollout_law, parts=parts, then=begin, environment=episodes)
    flow = filled(sample, reward_model.score(), algorithm, loader, context) >> algorithm.update()
    return Trainer(
        flow,
        loader,
        config.trainer,
        tracking=config.tracking,
        evaluate=_evaluation(config, actor, held_out, reward, episodes),
        callbacks=callbacks,
        params=config.model_dump(mode="json"),
    )


def find_algorithm(config: RunConfig) -> tuple[type[BaseAlgorithm], BaseAlgorithm.Config]:
    """The class that ``algorithm.name`` names, and its Config.

    Raises:
        ConfigError: no such algorithm, or its fields are wrong.
    """
    values = dict(config.algorithm)
    name = str(values.pop("name", "grpo"))
    if name.startswith(USER_CODE):
        found = load_user_object(name)
        if not (isinstance(found, type) and issubclass(found, BaseAlgorithm)):
            raise ConfigError(f"algorithm.name={name!r} is {found!r}, expected a subclass of BaseAlgorithm")
    else:
        try:
            found = ALGORITHMS[name]
        except ValueError as error:
            raise ConfigError(f"algorithm.name: {error}") from None
    return found, found.Config.parse(values, where="algorithm")


def check_engine(config: RunConfig) -> None:
    """Raises ConfigError for an unknown rollout engine or bad options of it; the engine is built in the first step."""
    try:
        engine = ENGINES[config.actor.rollout.engine]
    except ValueError as error:
        raise ConfigError(f"actor.rollout.engine: {error}") from None
    engine.check_options(config.actor.rollout.options)


def build_actor(config: RunConfig, context: ParallelContext, tokenizer: object, num_optimizer_steps: int) -> Actor:
    """The policy, from a Hugging Face folder or a Megatron checkpoint; the schedule decays over the whole run."""
    actor_config = config.actor.over(num_optimizer_steps).model_copy(update={"seed": config.seed})
    return Actor(starting_model(config), tokenizer, context=context, config=actor_config)


def starting_model(config: RunConfig) -> str | MegatronCheckpoint:
    """The initial model: a Hugging Face folder or id, or a Megatron checkpoint."""
    found = MegatronCheckpoint.find(config.model, config.model_config_path)
    if found is None and config.model_config_path is not None:
        raise ConfigError(
            f"model_config_path={config.model_config_path} describes a Megatron checkpoint, but model={config.model} "
            "is not one: leave it out, or correct model"
        )
    return found or config.model


def _reference(config: RunConfig, actor: Actor) -> Reference | None:
    if config.reference is None:
        return None
    source = config.reference.model
    if source is None:
        return Reference(actor, offload=config.reference.offload)
    return Reference(source, actor.tokenizer, context=actor.context, config=config.actor)


def _critic(config: RunConfig, actor: Actor, num_optimizer_steps: int) -> Critic | None:
    if config.critic is None:
        return None
    critic_config = config.critic.over(num_optimizer_steps)
    source = config.critic.model or starting_model(config)
    return Critic(source, actor.tokenizer, context=actor.context, config=critic_config)


def _evaluation(
    config: RunConfig, actor: Actor, prompts: PromptDataset | None, reward: Reward, episodes: Episodes | None
) -> Evaluation | None:
    if prompts is None or config.evaluation is None:
        return None
    return Evaluation(actor, list(prompts), reward, config.evaluation.n, config.evaluation.temperature, episodes)


def load_callback(name: str) -> Callback:
    found = load_user_object(name)
    made = found() if isinstance(found, type) else found
    if not isinstance(made, Callback):
        raise ConfigError(f"callbacks: {name!r} is {made!r}, expected a subclass of megatron_rl.Callback")
    return made
