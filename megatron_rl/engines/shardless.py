"""`ShardlessEngine`: what a rollout rank holds in the place of a training engine: no weights, but what the model is.

The training ranks build the model, and tell the rollout ranks its architecture and where its weights sit; with that a
rollout rank plans pushes, builds its rollout engine and checks prompts. Whatever would compute raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.data.packing import MicroBatch
from megatron_rl.devices import current_platform
from megatron_rl.engines.base import MicroBatching, Origin, Output, TrainingEngine
from megatron_rl.models import Architecture
from megatron_rl.parallel import ParallelContext
from megatron_rl.parallel.agreement import PeerConfigError, PeerError
from megatron_rl.parallel.worlds import SplitWorld
from megatron_rl.reshard import Layout


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What rollout ranks know of an engine of the training ranks. Sent by training rank 0."""

    architecture: Architecture
    layout: Layout  # over the training ranks
    dtype: torch.dtype
    origin: Origin
    micro_batching: MicroBatching
    shared_value_head: bool
    packs: bool


@dataclass(frozen=True, slots=True)
class BuildFailure:
    """What training rank 0 sends in place of `EngineFacts`."""

    message: str
    mistaken: bool  # a mistake in the configuration


class ShardlessEngine(TrainingEngine):
    """The rollout ranks' side of an engine."""

    kind = "none"

    def __init__(self, facts: EngineFacts, context: ParallelContext, name: str) -> None:
        self.facts, self.context, self.name = facts, context, name
        self.architecture, self.origin = facts.architecture, facts.origin
        self.micro_batching, self.shared_value_head = facts.micro_batching, facts.shared_value_head

    @property
    def device(self) -> torch.device:
        return current_platform().device

    @property
    def dtype(self) -> torch.dtype:
        return self.facts.dtype

    @property
    def layout(self) -> Layout:
        """Over the training ranks, as torchrun numbers them."""
        return self.facts.layout

    @property
    def packs(self) -> bool:
        return self.facts.packs

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def sync_parameters(self) -> None:
        """There are none."""

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            f"this is one of the job's rollout ranks, which hold no weights of {self.name} (parallel.rollout_ranks): "
            "let `Trainer` run the flow, and call what trains on training ranks only"
        )

    def forward(self, batch: Batch, micro_batches: Sequence[MicroBatch], output: Output) -> list[Any]:
        self._refuse()

    def forward_backward(self, batch: Batch, micro_batches: Sequence[MicroBatch], output: Output) -> list[Any]:
        self._refuse()

    def token_logprobs(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        self._refuse()

    def largest_gradient(self) -> float:
        self._refuse()

    def step(self) -> float | None:
        self._refuse()

    @property
    def learning_rate(self) -> float:
        self._refuse()

    def state(self, prefix: str = "", loading: bool = False) -> dict[str, Any]:
        self._refuse()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._refuse()


def built_by_training_ranks(
    build: Callable[[], TrainingEngine], context: ParallelContext, split: SplitWorld, name: str
) -> TrainingEngine:
    """What ``build`` makes on training ranks; on rollout ranks its `ShardlessEngine`. Collective over all ranks.

    Raises:
        PeerError: on rollout ranks: it could not be built.
    """
    if split.on_rollout:
        told = split.messages.receive(0)
        if isinstance(told, BuildFailure):
            raise (PeerConfigError if told.mistaken else PeerError)(f"on the training ranks, {told.message}")
        return ShardlessEngine(told, context, name)
    try:
        engine = build()
        told = EngineFacts(
            engine.architecture,
            engine.layout,
            engine.dtype,
            engine.origin,
            engine.micro_batching,
            engine.shared_value_head,
            engine.packs,
        )
    except Exception as error:
        if context.rank == 0:
            message = f"{type(error).__name__}: {error}"
            split.messages.send(BuildFailure(message, isinstance(error, ConfigError)), split.rollout_ranks)
            split.messages.flush()
        raise
    if context.rank == 0:
        split.messages.send(told, split.rollout_ranks)
    return engine
