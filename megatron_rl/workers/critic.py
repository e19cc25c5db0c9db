"""`Critic`: a model with a value head, in training; the value model of PPO, or a reward model that is being trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage
from megatron_rl.engines.build import build_engine
from megatron_rl.engines.engine_config import EngineConfig
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers.forward_only import forward_only_stage
from megatron_rl.workers.job_context import role_context
from megatron_rl.workers.outputs import Predict, value_output
from megatron_rl.workers.trained_worker import TrainedWorker


class Critic(TrainedWorker):
    """A value model in this job's layout, with its optimizer.

    Args:
        model: as for `Actor`: of a sequence classifier with one label, or of a language model, whose decoder is taken
            over under a value head of zeros. Megatron chunks have a `ValueHead`.
        tokenizer: goes into the folder of `save_pretrained`; needed for Megatron chunks, whose logical vocabulary is
            its length.
        optimizer, parallel_state, parallel, context, scheduler: as for `Actor`.
        config: a `Critic.Config`, or its fields by name.

    Raises:
        ConfigError: layout, model and config do not fit together.
    """

    Config = EngineConfig

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        optimizer: Any = None,
        parallel_state: Any = None,
        *,
        parallel: ParallelSizes | None = None,
        context: ParallelContext | None = None,
        scheduler: Any = None,
        config: EngineConfig | Mapping[str, Any] | None = None,
    ) -> None:
        config = EngineConfig.of(config, "Critic")
        engine = build_engine(
            model,
            role_context(model, context, parallel_state, parallel, config.seed),
            config,
            name="critic",
            vocab=0 if tokenizer is None else len(tokenizer),
            optimizer=optimizer,
            scheduler=scheduler,
            value_model=True,
        )
        super().__init__(engine, config, tokenizer)

    def values(self, write: str = "values") -> Stage:
        """A stage that writes values, fp32 ``[num_tokens]``: at token t, of the prefix that ends just before t."""
        return forward_only_stage("critic.values", self.engine, value_output, write)

    def predictor(self, batch: Batch, with_entropy: bool) -> Predict:
        """The loss reads ``inputs.values``."""
        assert not with_entropy, "a value model has no entropy"
        return lambda micro_batch, output: {"values": self.engine.values(output)}
