"""`BaseAlgorithm`: data flow, parallelism, metrics and checkpoints for any policy optimisation.

A new algorithm is one file: subclass, override `prepare` (advantages, from plain tensors on the host) and/or `loss` (a
pure function of a record), and name the fields that they read. `update()` is the flow of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from megatron_rl.algorithms.advantages import group_advantages, spread_over_tokens
from megatron_rl.algorithms.aggregation import token_average
from megatron_rl.algorithms.importance import masked_log_ratio
from megatron_rl.algorithms.moments import describe
from megatron_rl.algorithms.pack_samples import pack_samples, require_finite
from megatron_rl.algorithms.roles import LogprobSource, NoWorker, Policy, ValueSource
from megatron_rl.algorithms.surrogate import clipped_surrogate
from megatron_rl.batch import Batch, Sample
from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.config.ranges import Seed
from megatron_rl.dataflow import Flow, Stage
from megatron_rl.registry import Registry
from megatron_rl.workers.loss import LossInputs, LossOutput

ALGORITHMS: Registry[type[BaseAlgorithm]] = Registry("algorithm")


class BaseAlgorithm:
    """One way to turn samples and rewards into optimizer steps.

    By itself it is policy optimisation with group-normalised advantages and a clipped ratio (clip 0.2, token mean).
    Subclasses override `prepare` and `loss`; larger changes override a ``*_stage`` method or `update`.

    Example:
        @ALGORITHMS.register("my-algorithm")
        class MyAlgorithm(BaseAlgorithm):
            def prepare(self, batch):
                batch.tokens["advantages"] = ...

            def loss(self, inputs):
                ...
    """

    class Config(ConfigRecord):
        """Settings of every algorithm."""

        num_epochs: int = Field(default=1, ge=1)
        """Passes over the samples of one step."""
        num_mini_batches: int = Field(default=1, ge=1)
        """Optimizer steps per pass."""
        old_logprobs: Literal["auto", "recompute", "rollout", "current"] = "auto"
        """Log-probabilities in the denominator of the ratio. recompute: the trainer's before the step. rollout: the
        engine's. current: the trainer's at each optimizer step, so that the ratio is 1. auto: current when a step is
        one optimizer step and nothing else needs them, otherwise recompute."""
        mask_truncated: bool = False
        """Leave responses that hit the token limit out of the loss (they still count in their group's statistics)."""
        seed: Seed = 0
        """Seed of the shuffling into mini-batches."""

    config: Any  # this class's own `Config`; subclasses narrow the type
    name: ClassVar[str] = "algorithm"  # prefix of the names of its stages
    token_reads: tuple[str, ...] = ("advantages",)  # token fields that `loss` reads, besides mask and old logprobs
    sequence_reads: tuple[str, ...] = ()  # sequence fields that `loss` reads
    prepare_reads: tuple[str, ...] = ("rewards", "groups", "response_mask")
    prepare_writes: tuple[str, ...] = ("advantages",)
    group_field: str | None = None  # sequences that share this field's value stay in one micro-batch
    drops_samples: bool = False  # whether `keep_samples` is called
    max_sampling_rounds: int = 10

    def __init__(
        self,
        actor: Policy,
        reference: LogprobSource | None = None,
        critic: ValueSource | None = None,
        config: Config | Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        """
        Args:
            actor: the policy in training.
            reference: the frozen policy of KL terms.
            critic: the value model, where the algorithm has one.
            config: this class's `Config`, or its values; ``overrides`` replace single values.

        Raises:
            ConfigError: unknown keys, bad values, or a worker that the configuration needs is missing.
        """
        given = config.model_dump() if isinstance(config, ConfigRecord) else dict(config or {})
        self.config = self.Config.parse({**given, **overrides}, where=f"{type(self).__name__}.Config")
        self.actor = actor
        self.reference = reference
        self.critic = critic
        self.step = 0  # updates done so far

    @classmethod
    def without_workers(cls, config: Config | Mapping[str, Any] | None = None, **overrides: Any) -> Self:
        """The algorithm for its formulas alone: `loss` (and PPO's `critic_loss`) are functions of the configuration and
        of `LossInputs`; whatever needs a model raises."""
        return cls(cast(Policy, NoWorker()), config=config, **overrides)

    @classmethod
    def loss_fn(cls, config: Config | Mapping[str, Any] | None, inputs: LossInputs) -> LossOutput:
        """`loss` as a function of a configuration and of tensors, differentiable in the tensors of ``inputs``.

        With ``ref_logprobs`` in ``inputs`` there is a reference, and with ``old_logprobs="auto"`` the field
        ``old_logprobs`` is used if it is there.

        Raises:
            ConfigError: as from the constructor.
            KeyError: a field that this configuration reads is missing.
        """
        algorithm = cls.without_workers(config)
        if "ref_logprobs" in inputs.fields:
            algorithm.reference = NoWorker()
        given = algorithm.config
        if (
            "old_logprobs" in inputs.fields
            and "old_logprobs" in type(given).model_fields
            and given.old_logprobs == "auto"
        ):
            algorithm.config = given.model_copy(update={"old_logprobs": "recompute"})
        return algorithm.loss(inputs)

    # --- to be overridden by algorithms ----------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> None:
        """Write the fields of ``prepare_writes``; runs once per step, on the host, on the whole sequences of this
        rank."""
        values = group_advantages(batch["rewards"], batch["groups"], normalize_std=True)
        batch.tokens["advantages"] = spread_over_tokens(batch, values)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """The loss of one micro-batch; pure. Divide by ``inputs.totals``, never by counts of this micro-batch."""
        log_ratio = masked_log_ratio(inputs, inputs.logprobs, self.old_logprobs_of(inputs))
        surrogate = clipped_surrogate(log_ratio, inputs.fields["advantages"], 0.2, 0.2)
        average = token_average(inputs, "token-mean")
        metrics = {
            "loss/policy": average.metric(surrogate.loss),
            "policy/clip_fraction": inputs.token_metric(surrogate.clipped.float()),
        }
        return LossOutput(average(surrogate.loss), metrics)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Adapt to the metrics of a finished step (the same on all ranks); called once per step."""

    def keep_samples(self, samples: Sequence[Sample]) -> list[bool]:
        """Which samples, with their rewards, are worth training on; called where ``drops_samples`` is set. New prompts
        are sampled in place of groups of which none is kept, in at most ``max_sampling_rounds`` rounds a step."""
        return [True] * len(samples)

    # --- the flow --------------------------------------------------------------------------------------------------

    def update(self) -> Flow:
        """One step as a flow: pack, forward passes without gradient, prepare, optimise."""
        return Flow((self.pack_stage(), *self.forward_stages(), self.prepare_stage(), *self.optimize_stages()))

    def pack_stage(self) -> Stage:
        """samples and rewards -> packed tensors."""

        def pack(batch: Batch) -> None:
            pack_samples(batch, mask_truncated=self.config.mask_truncated)

        writes = ("input_ids", "response_mask", "rollout_logprobs", "groups", "rewards")
        return Stage("batch.pack", pack, reads=("samples", "rewards"), writes=writes, place="host", collective=False)

    def forward_stages(self) -> list[Stage]:
        """Forward passes without gradient that `prepare` or `loss` need."""
        return [self.actor.logprobs(write="old_logprobs")] if self.old_logprobs_field == "old_logprobs" else []

    def prepare_stage(self) -> Stage:
        def check(batch: Batch) -> None:
            checked = dict.fromkeys((*self.prepare_reads, *self.loss_fields))
            require_finite(batch, [name for name in checked if name in batch])

        def run(batch: Batch) -> None:
            self.prepare(batch)
            if "advantages" in batch.tokens:
                mask = batch["response_mask"]
                batch.metrics.update(describe("advantages", batch["advantages"], mask, self.dp_group))
            if "rewards" in batch.sequences:
                rewards = batch["rewards"]
                everything = torch.ones_like(rewards, dtype=torch.bool)
                batch.metrics.update(describe("rewards", rewards, everything, self.dp_group))

        return Stage(f"{self.name}.prepare", run, self.prepare_reads, self.prepare_writes, place="host", check=check)

    def optimize_stages(self) -> list[Stage]:
        """The gradient steps; the last one counts the step and calls `observe`."""

        def run(batch: Batch) -> None:
            batch.metrics.update(self.optimize_actor(batch))
            self.finish_step(batch)

        return [self.loss_stage("actor.optimize", run, self.optimize_reads)]

    @property
    def optimize_reads(self) -> tuple[str, ...]:
        """Every field of the batch that a pass over the loss reads."""
        units = (self.group_field,) if self.group_field else ()
        return ("input_ids", "response_mask", *self.loss_fields, *self.sequence_reads, *units)

    def loss_stage(self, name: str, run: Callable[[Batch], None], reads: tuple[str, ...]) -> Stage:
        """The stage in which a worker computes its loss; what the loss reads is checked first to be finite."""

        def check(batch: Batch) -> None:
            require_finite(batch, [name for name in reads if name in batch.tokens or name in batch.sequences])

        agreement = self.actor.context.agreement
        worker = name.partition(".")[0]
        return Stage(name, run, reads, ("metrics",), worker, check=check, agreement=agreement, part=self)

    def optimize_actor(self, batch: Batch) -> dict[str, float]:
        """All epochs and mini-batches of one step on the actor."""
        return self.actor.optimize(
            batch,
            self.loss,
            num_epochs=self.config.num_epochs,
            num_mini_batches=self.config.num_mini_batches,
            reads=self.loss_fields,
            sequence_reads=self.sequence_reads,
            with_entropy=self.with_entropy,
            group_field=self.group_field,
            seed=self.config.seed + self.step,
        )

    def finish_step(self, batch: Batch) -> None:
        self.step += 1
        self.observe(batch.metrics)

    # --- what follows from the configuration -----------------------------------------------------------------------

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the other sequences of this step."""
        return self.actor.context.dp_group

    @property
    def with_entropy(self) -> bool:
        """Whether `loss` reads ``inputs.entropy``."""
        return False

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether something before the loss needs the trainer's old log-probabilities."""
        return False

    @property
    def old_logprobs_field(self) -> str | None:
        """The token field with the ratio's denominator; None: the current policy's log-probabilities."""
        choice = self.config.old_logprobs
        if choice == "auto":
            single = self.config.num_epochs * self.config.num_mini_batches == 1
            choice = "current" if single and not self.needs_old_logprobs else "recompute"
        return {"recompute": "old_logprobs", "rollout": "rollout_logprobs", "current": None}[choice]

    @property
    def loss_fields(self) -> tuple[str, ...]:
        """Every token field that the worker must hand to `loss`, besides ``response_mask``."""
        old = (self.old_logprobs_field,) if self.old_logprobs_field else ()
        return tuple(dict.fromkeys((*old, *self.token_reads)))

    def old_logprobs_of(self, inputs: LossInputs) -> Tensor:
        """The ratio's denominator inside `loss`, ``[num_tokens]``, without gradient."""
        field = self.old_logprobs_field
        return inputs.logprobs.detach() if field is None else inputs.fields[field]

    def require(self, part: str, why: str) -> None:
        """Raises ConfigError when ``part`` ("reference" or "critic") was not given."""
        if isinstance(self.actor, NoWorker):
            return
        if {"reference": self.reference, "critic": self.critic}[part] is None:
            raise ConfigError(f"{type(self).__name__}: {why} needs {part}=..., which was not given")

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, weights excepted."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
