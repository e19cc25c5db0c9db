"""`Critic`: a model with a value head, in training; the value model of PPO, or a reward model that is being trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers.assembly import assemble, job_context
from megatron_rl.workers.heads import LossFunction, value_head
from megatron_rl.workers.megatron_model import MegatronModel
from megatron_rl.workers.scoring import token_values_stage
from megatron_rl.workers.settings import WorkerSettings
from megatron_rl.workers.trainable import Optimization, TrainableModel


class Critic:
    """A value model in this job's layout, with its optimizer.

    Args:
        model: a Hugging Face folder or model whose decoder is taken over; the value head starts at zero.
        parallel_state, parallel, context, settings: as for `Actor`.

    Raises:
        ConfigError: layout, model and settings do not fit together.
    """

    Config = WorkerSettings

    def __init__(
        self,
        model: Any,
        parallel_state: Any = None,
        *,
        parallel: ParallelSizes | None = None,
        context: ParallelContext | None = None,
        settings: WorkerSettings | None = None,
    ) -> None:
        self.settings = settings or WorkerSettings()
        context = context or job_context(parallel_state, parallel, self.settings.seed)
        self.trainable: TrainableModel = assemble(
            model, context, self.settings, vocab=0, name="critic", value_head=True
        )
        self.num_updates = 0  # calls of `optimize`

    @property
    def model(self) -> MegatronModel:
        return self.trainable.model

    @property
    def context(self) -> ParallelContext:
        return self.model.context

    def values(self, write: str = "values") -> Stage:
        """A stage that writes values, fp32 ``[num_tokens]``: at token t, of the prefix that ends just before t."""
        return token_values_stage("critic.values", self.trainable, value_head, write)

    def optimize(
        self,
        batch: Batch,
        loss: LossFunction,
        *,
        num_epochs: int = 1,
        num_mini_batches: int = 1,
        reads: tuple[str, ...] = (),
        sequence_reads: tuple[str, ...] = (),
        with_entropy: bool = False,
        group_field: str | None = None,
        seed: int = 0,
    ) -> dict[str, float]:
        """As `Actor.optimize`; the loss reads ``inputs.values``."""
        assert not with_entropy, "a value model has no entropy"
        mixed = ((self.settings.seed * 1_000_003 + seed) * 1_000_003 + self.num_updates) % 2**62
        how = Optimization(num_epochs, num_mini_batches, reads, sequence_reads, group_field, mixed)
        score = lambda micro_batch, output: {"values": output.squeeze(-1).float()}  # noqa: E731
        metrics = self.trainable.optimize(batch, loss, how, lambda part: score)
        self.num_updates += 1
        return metrics

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs for the same mini-batches."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.num_updates = state["num_updates"]
