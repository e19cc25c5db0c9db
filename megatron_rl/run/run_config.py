"""`RunConfig`: everything that `megatron-rl train config.yaml` needs to know.

Each section is the configuration class of the part that it configures, so its fields and their meaning are documented
there and an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron_rl.config import ConfigRecord
from megatron_rl.config.ranges import Seed
from megatron_rl.data import PromptDataset
from megatron_rl.engines.engine_config import EngineConfig
from megatron_rl.environments import EnvironmentConfig
from megatron_rl.parallel import ParallelSizes
from megatron_rl.rewards import RewardConfig
from megatron_rl.tracking import TrackerGroup
from megatron_rl.trainer.trainer_config import TrainerConfig
from megatron_rl.workers.actor_config import ActorConfig
from megatron_rl.workers.prompt_groups.law import LawName


class ReferenceConfig(ConfigRecord):
    """The frozen policy of KL terms."""

    model: str | None = None
    """Hugging Face folder or id; None = a copy of the actor as it is before the first step."""
    offload: bool = False
    """Keep the copy of the actor's weights in host memory while it is not used."""


class CriticConfig(EngineConfig):
    """The value model of PPO, with weights of its own."""

    model: str | None = None
    """Hugging Face folder or id; None = the actor's."""


class EvaluationConfig(ConfigRecord):
    """Greedy (or sampled) answers to held-out prompts, with the same rewards."""

    data: PromptDataset.Config
    """The prompts."""
    n: int = Field(default=1, ge=1)
    """Samples a prompt; their rewards are averaged."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 = greedy."""


class RunConfig(ConfigRecord):
    """One training run."""

    model: str
    """Hugging Face folder or id, or a Megatron distributed checkpoint, for example of another run."""
    model_config_path: str | None = None
    """Hugging Face folder or config.json that describes a Megatron checkpoint which does not carry its own."""
    tokenizer: str | None = None
    """Folder or id of the tokenizer; None = the model's."""
    pad_token: str | None = None
    """The pad token of a tokenizer that has none: "eos", or a token of its vocabulary."""
    algorithm: dict[str, Any] = Field(default_factory=lambda: {"name": "grpo"})
    """``name`` of the algorithm, or python:file.py:Class, and the fields of its Config."""
    parallel: ParallelSizes = ParallelSizes()
    """Parallel sizes of training; data parallelism takes the ranks that remain."""
    actor: ActorConfig = ActorConfig()
    """The policy: precision, micro-batches, optimizer, sampling, rollout engine."""
    critic: CriticConfig | None = None
    """The value model, for algorithms that have one."""
    reference: ReferenceConfig | None = None
    """The frozen reference; leave it out for training without KL."""
    data: PromptDataset.Config
    """Training prompts."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts of one step, over all data-parallel ranks; times `actor.sampling.n` samples."""
    rollout_parts: int = Field(default=1, ge=1)
    """Number of parts in which the prompts of a step are generated; reward services work on one part while the next is
    generated."""
    rollout_lag: int = Field(default=0, ge=0)
    """Steps by which the weights that sample may be older than those that are trained: with `parallel.rollout_ranks`,
    these generate the samples of step k + rollout_lag while training ranks take step k. 0 = they take turns."""
    rollout_law: LawName = "batch"
    """Which samples a step takes where `rollout_lag` is above 0. batch: those of its own prompts, all from the weights
    `rollout_lag` steps before. windowed: groups that have finished, none from older weights than that."""
    shuffle: bool = True
    """Shuffle the prompts in each epoch."""
    rewards: tuple[RewardConfig, ...] = ()
    """The rewards of samples; several are summed with their weights. Only with an environment there may be none."""
    environment: EnvironmentConfig | None = None
    """What the model talks to: each sample is an episode of many turns, in evaluation too. Its rewards are added to
    those of `rewards`."""
    evaluation: EvaluationConfig | None = None
    """Held-out evaluation; `trainer.evaluate_every` says when."""
    callbacks: tuple[str, ...] = ()
    """Callbacks of your own: file.py:Class or package.module:Class."""
    trainer: TrainerConfig = TrainerConfig()
    """Length of the run, checkpoints, outputs."""
    tracking: TrackerGroup.Config = TrackerGroup.Config()
    """Where metrics go."""
    seed: Seed = 0
    """Seed of data order, sampling and initialisation."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Level of the console log on rank 0."""
