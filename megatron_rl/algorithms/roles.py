"""Protocols of the workers that algorithms use; `Actor`, `Reference` and `Critic` of `megatron_rl.workers` have these
methods. Algorithms know nothing else about models, so their formulas can be tested without any.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist

from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage
from megatron_rl.parallel.agreement import Agreement
from megatron_rl.rollout.base import WeightCheck
from megatron_rl.workers.loss import LossFunction


class NoWorker:
    """Placeholder for a worker where an algorithm is used for its formulas alone."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this algorithm was made without workers, so there is no {name!r}: give it an actor")


class Replicas(Protocol):
    """The data-parallel replicas of a worker's model."""

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold other sequences of the same step; None in a single process."""

    @property
    def agreement(self) -> Agreement | None:
        """Of all ranks of the job; None in a single process."""


class Trainable(Protocol):
    """A worker whose weights an algorithm may change."""

    @property
    def context(self) -> Replicas:
        """Groups of this worker's parallel layout."""

    def optimize(
        self,
        batch: Batch,
        loss: LossFunction,
        *,
        num_epochs: int,
        num_mini_batches: int,
        reads: tuple[str, ...],
        sequence_reads: tuple[str, ...],
        with_entropy: bool,
        group_field: str | None,
        seed: int,
    ) -> dict[str, float]:
        """Take ``num_epochs * num_mini_batches`` optimizer steps; returns metrics reduced over all ranks."""

    def measure(
        self,
        batch: Batch,
        loss: LossFunction,
        *,
        reads: tuple[str, ...],
        sequence_reads: tuple[str, ...],
        with_entropy: bool,
        group_field: str | None,
    ) -> dict[str, float]:
        """The metrics of a loss without a step, reduced over all ranks."""


class LogprobSource(Protocol):
    """A model that gives log-probabilities: the reference, or the actor itself."""

    def logprobs(self, write: str) -> Stage:
        """A stage that reads ``input_ids`` and writes the token field ``write``."""


class Policy(Trainable, LogprobSource, Protocol):
    """The actor."""

    @property
    def policy_version(self) -> int:
        """Version of the training weights, as in `Sample.policy_version`."""

    def verify_weights(self) -> WeightCheck:
        """Check that the rollout engines still hold the pushed weights; collective over all ranks."""


class ValueSource(Trainable, Protocol):
    """The critic, or a reward model in training: a model with a value head."""

    def values(self, write: str) -> Stage:
        """A stage that reads ``input_ids`` and writes the token field ``write``: at token t, the value head's
        output on the prefix that ends just before t."""
