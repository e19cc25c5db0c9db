"""Which sections of a configuration a run uses: what its algorithm needs, and what is given but not used."""

from __future__ import annotations

from megatron_rl.algorithms import ALGORITHMS, PPO, BaseAlgorithm, OfflineAlgorithm, PolicyGradient
from megatron_rl.algorithms.roles import NoWorker
from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.rewards import RewardConfig
from megatron_rl.rollout.placement import RolloutPlacement
from megatron_rl.run.run_config import RunConfig
from megatron_rl.trainer.refill import REFILLS
from megatron_rl.trainer.trainer_config import TrainerConfig
from megatron_rl.workers.actor_config import ActorConfig


def check_parts(config: RunConfig, algorithm: type[BaseAlgorithm], algorithm_config: BaseAlgorithm.Config) -> None:
    """Raise ConfigError where the algorithm cannot be run from prompts and rewards, lacks a section that it needs, or
    does not use the value model of the section critic. Custom algorithms may use a critic as they like."""
    check_lag(config)
    check_law(config, algorithm, algorithm_config)
    name = config.algorithm.get("name", "grpo")
    if issubclass(algorithm, OfflineAlgorithm):
        raise ConfigError(
            f"algorithm {name!r} learns from given responses, and a run samples its own: call its trainer instead "
            "(DPOTrainer, KTOTrainer, SFTTrainer, RewardTrainer; see docs/trainers.md)"
        )
    if name not in ALGORITHMS:
        return
    if issubclass(algorithm, PPO):
        shared = bool(getattr(algorithm_config, "shared_critic", False))
        if shared and config.critic is not None:
            raise ConfigError(
                "the section critic is given, but with algorithm.shared_critic=true the values come from the actor's "
                "own weights: leave one of them out"
            )
        if shared and not config.actor.value_head:
            raise ConfigError("algorithm.shared_critic=true needs actor.value_head=true")
        if not shared and config.critic is None:
            raise ConfigError(f"algorithm {name!r} needs a value model: add the section critic ({{}} will do)")
    elif config.critic is not None:
        raise ConfigError(f"the section critic is given, but algorithm {name!r} has no value model: leave critic out")
    require_group(algorithm, config.actor.sampling.n)
    coefficient = getattr(algorithm_config, "kl_coefficient", None)
    if coefficient and config.reference is None:
        raise ConfigError(
            f"algorithm.kl_coefficient={coefficient} needs a reference: add the section reference ({{}} "
            "will do), or set it to 0"
        )


def require_group(algorithm: type[BaseAlgorithm], n: int) -> None:
    """Raise ConfigError where ``n`` samples of a prompt give no advantages."""
    if n == 1 and issubclass(algorithm, PolicyGradient) and algorithm.compares_samples:
        raise ConfigError(
            f"n=1, but {algorithm.__name__} compares the samples of a prompt with one another: every advantage would "
            "be 0, give n (actor.sampling.n) of at least 2"
        )


def rewards_of(config: RunConfig) -> tuple[RewardConfig, ...]:
    """The rewards of the run: without any, an environment's own."""
    return config.rewards or ((RewardConfig(name="environment"),) if config.environment else ())


def check_lag(config: RunConfig) -> None:
    """Raise ConfigError for a lag without ranks that sample meanwhile."""
    if config.rollout_lag and not config.parallel.rollout_ranks:
        raise ConfigError(
            f"rollout_lag={config.rollout_lag} needs ranks that sample while others train: set parallel.rollout_ranks, "
            "or rollout_lag=0"
        )


def check_law(config: RunConfig, algorithm: type[BaseAlgorithm], algorithm_config: BaseAlgorithm.Config) -> None:
    """Raise ConfigError for a run that the windowed law cannot be obeyed in."""
    if config.rollout_law != "windowed":
        return
    if not config.rollout_lag:
        raise ConfigError("rollout_law=windowed lets groups stay in flight over steps: set rollout_lag to 1 or more")
    if config.environment is not None:
        raise ConfigError("rollout_law=windowed knows no episodes yet: take rollout_law=batch, or no environment")
    if config.algorithm.get("name", "grpo") in ALGORITHMS and algorithm.without_workers(algorithm_config).drops_samples:
        raise ConfigError(REFILLS.format(algorithm.name))


def uses_reference(config: RunConfig, algorithm: type[BaseAlgorithm], algorithm_config: BaseAlgorithm.Config) -> bool:
    """Whether the reference's log-probabilities are read; always assumed of a custom algorithm."""
    if config.reference is None:
        return False
    if config.algorithm.get("name", "grpo") not in ALGORITHMS or not issubclass(algorithm, PolicyGradient):
        return True
    made = algorithm.without_workers(algorithm_config)
    made.reference = NoWorker()
    return made.with_kl


def unused_parts(
    config: RunConfig, algorithm: type[BaseAlgorithm], algorithm_config: BaseAlgorithm.Config
) -> list[str]:
    """Settings that are given and have no effect, a line each."""
    found: list[str] = []
    reference, trainer = config.reference, config.trainer

    def note(unused: object, key: str, why: str) -> None:
        if unused:
            found.append(f"{key} is given, but not used: {why}")

    note(
        reference and not uses_reference(config, algorithm, algorithm_config),
        "the section reference",
        "algorithm.kl_coefficient is 0, so no reference is loaded",
    )
    note(
        reference and reference.model and reference.offload,
        "reference.offload",
        "it applies to a copy of the actor's weights, and reference.model names another model",
    )
    shared = issubclass(algorithm, PPO) and bool(getattr(algorithm_config, "shared_critic", False))
    note(
        config.actor.value_head and not shared and config.algorithm.get("name", "grpo") in ALGORITHMS,
        "actor.value_head",
        "it is for algorithm.shared_critic=true",
    )
    default_seed = ActorConfig.model_fields["seed"].default
    note(config.actor.seed not in (default_seed, config.seed), "actor.seed", f"the run's seed={config.seed} counts")
    note(
        trainer.evaluate_every and config.evaluation is None,
        "trainer.evaluate_every",
        "there is nothing to evaluate on without the section evaluation",
    )
    collectives = config.actor.collectives
    note(
        collectives.all_reduce == "library" and (collectives.links or collectives.wire_dtype != "same"),
        "actor.collectives.links" if collectives.links else "actor.collectives.wire_dtype",
        "it is for actor.collectives.all_reduce=hybrid",
    )
    note(
        collectives.error_feedback and collectives.wire_dtype == "same",
        "actor.collectives.error_feedback",
        "nothing is rounded with actor.collectives.wire_dtype=same",
    )
    note(
        config.actor.rollout.sleep_while_training and config.parallel.rollout_ranks,
        "actor.rollout.sleep_while_training",
        "engines of rollout ranks share their devices with no training",
    )
    default_epochs = TrainerConfig.model_fields["num_epochs"].default
    note(
        trainer.num_steps is not None and trainer.num_epochs != default_epochs,
        "trainer.num_epochs",
        f"trainer.num_steps={trainer.num_steps} counts",
    )
    return found


def check_layout(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError unless model, rollout replicas and step can be divided among the ``world_size`` ranks that
    torchrun starts."""
    sizes, tp = config.parallel, config.actor.rollout.tp
    grid = RankGrid(sizes, sizes.num_training(world_size))
    if sizes.rollout_ranks and sizes.rollout_ranks % tp:
        raise ConfigError(
            f"actor.rollout.tp={tp} does not divide parallel.rollout_ranks={sizes.rollout_ranks}: use a "
            f"multiple of {tp}"
        )
    if not sizes.rollout_ranks:
        RolloutPlacement(grid.ranks(dp=0), tp)
    if config.prompts_per_step % grid.dp:
        beside = f" and {sizes.rollout_ranks} rollout ranks" if sizes.rollout_ranks else ""
        raise ConfigError(
            f"prompts_per_step={config.prompts_per_step} cannot be divided evenly among {grid.dp} data-parallel ranks "
            f"({grid.world_size} ranks, {sizes}{beside}): use a multiple of {grid.dp}"
        )


def smallest_world(sizes: ParallelSizes) -> int:
    """The number that the number of ranks must be a multiple of."""
    model, experts = sizes.tp * sizes.pp * sizes.cp, sizes.etp * sizes.ep * sizes.pp
    return next(n for n in range(model, model * experts + 1, model) if n % experts == 0)
