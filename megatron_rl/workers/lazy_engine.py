"""`LazyEngine`: one rank's rollout engine, built on first use, and where its replica stands among the ranks.

All ranks of a model replica know the prompts of their data-parallel rank; together they form one or more rollout
replicas. Where the job has rollout ranks (`parallel.worlds`), these alone have engines, and are one such model replica.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_rl.data import Limits
from megatron_rl.devices import current_platform
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.engines.engine_config import DTYPES
from megatron_rl.parallel.groups import own_group
from megatron_rl.reshard import Layout
from megatron_rl.rollout.base import ENGINES, RolloutEngine
from megatron_rl.rollout.placement import RolloutPlacement
from megatron_rl.workers.actor_config import RolloutConfig

RENDEZVOUS_SECONDS = 600.0  # that a collective of one rollout replica may wait for its ranks


class LazyEngine:
    """The engine of this rank.

    Args:
        model: whose weights it serves.
        eos: token ids that end a response.
        engine: one that exists already; None = built when `get` is first called.

    Raises:
        ConfigError: the engine that ``config`` names cannot serve such a model, or has no such options.
    """

    def __init__(
        self,
        model: TrainingEngine,
        tokenizer: Any,
        eos: tuple[int, ...],
        config: RolloutConfig,
        engine: RolloutEngine | None,
    ) -> None:
        self._type = ENGINES[config.engine].for_model(model.architecture)
        if engine is None:
            self._type.check_model(model.architecture)
            self._type.check_options(config.options)
        self._model, self._tokenizer, self._eos, self._config = model, tokenizer, eos, config
        self._engine = engine
        context, split = model.context, model.context.split
        ranks = [context.grid.ranks(dp=dp) for dp in range(context.grid.dp)]
        if split is not None:
            ranks = [tuple(range(split.num_rollout))]
        self._placements = [RolloutPlacement(replica, config.tp) for replica in ranks]

    @property
    def placement(self) -> RolloutPlacement:
        """The rollout replicas among the ranks of this rank's model replica."""
        return self._placements[self._model.context.coordinates.dp]

    @property
    def layout(self) -> Layout:
        """Where all engines of the job hold which parts of the weights, whether they are built or not."""
        return self._type.lay_out(self._model.architecture, self._config.tp, self._replicas(), self._config.ep)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rollout weights."""
        return DTYPES[self._config.dtype] if self._config.dtype else self._model.dtype

    def limits(self, max_tokens: int) -> Limits:
        """Vocabulary and length limits of prompts whose responses may have ``max_tokens``."""
        architecture = self._model.architecture
        context = self._type.context(self._config.options, architecture.max_positions)
        return Limits(architecture.vocab, context, max_tokens)

    def get(self) -> RolloutEngine:
        """The engine. With tensor parallelism the first call is collective over the ranks that have engines.

        Raises:
            RuntimeError: this rank only trains.
        """
        if self._engine is None:
            self._engine = self._build()
        return self._engine

    def close(self) -> None:
        """Release the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _replicas(self) -> tuple[tuple[int, ...], ...]:
        return tuple(replica for placement in self._placements for replica in placement.replicas)

    def _build(self) -> RolloutEngine:
        model, config = self._model, self._config
        if model.context.split is not None and not model.context.split.on_rollout:
            raise RuntimeError(
                "this is one of the training ranks of a job with rollout ranks, which alone generate: let `Trainer` "
                "run the flow"
            )
        backend = current_platform().backend
        group = own_group(self._replicas(), backend, RENDEZVOUS_SECONDS) if config.tp > 1 else None
        return self._type(  # type: ignore[call-arg]
            architecture=model.architecture,
            layout=self.layout,
            rank=model.context.rank,
            dtype=self.dtype,
            tp_group=group,
            eos_token_ids=self._eos,
            tokenizer=self._tokenizer,
            max_running=config.max_running,
            device=model.device,
            **config.options,
        )
