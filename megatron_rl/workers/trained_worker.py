"""`TrainedWorker`: what `Actor` and `Critic` share: a `TrainingEngine`, and the steps that it takes on a loss.

`optimize` is one update: epochs, mini-batches, and for each of these one forward, backward and step of the engine.
A subclass defines which model outputs its loss reads (`predictor`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.data.packing import MicroBatch
from megatron_rl.engines.base import Output, TrainingEngine
from megatron_rl.engines.engine_config import EngineConfig
from megatron_rl.engines.micro_batches import plan_micro_batches
from megatron_rl.parallel import ParallelContext
from megatron_rl.parallel.groups import gather_objects
from megatron_rl.workers.balance import balance
from megatron_rl.workers.loss import LossFunction, Mean
from megatron_rl.workers.mini_batches import split_mini_batches, unit_ids
from megatron_rl.workers.outputs import Predict, loss_output
from megatron_rl.workers.reductions import global_totals, reduce_metrics, require_finite
from megatron_rl.workers.saving import describe_checkpoint, save_adapters, save_pretrained

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A loss function and what it reads."""

    loss: LossFunction
    tokens: tuple[str, ...] = ()  # token fields, besides response_mask
    sequences: tuple[str, ...] = ()  # sequence fields
    with_entropy: bool = False
    group_field: str | None = None  # sequences with equal values stay in one micro-batch and mini-batch

    def groups(self, batch: Batch) -> list[int] | None:
        return batch.sequences[self.group_field].tolist() if self.group_field else None


class TrainedWorker:
    """A role around a model in training."""

    def __init__(self, engine: TrainingEngine, config: EngineConfig, tokenizer: Any) -> None:
        self.engine = engine
        self.config = config
        self.tokenizer = tokenizer
        self.num_updates = 0  # calls of `optimize` so far

    @property
    def context(self) -> ParallelContext:
        return self.engine.context

    # Optimising

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
        """Take ``num_epochs * num_mini_batches`` optimizer steps on ``loss``; returns metrics over all steps and ranks,
        and ``optimizer/...``.

        Args:
            loss: pure function of `LossInputs`, run where the last layer is for each micro-batch.
            reads, sequence_reads: token and sequence fields of the batch that the loss reads.
            with_entropy: whether the loss reads the entropy.
            group_field: sequence field; sequences with equal values stay in one micro-batch and mini-batch.
            seed: of the order of mini-batches; the worker's own seed and its number of updates are mixed in.

        Raises:
            FloatingPointError: the loss or the gradient of a step is not finite; that step has changed nothing. Not
                where a loss scale that can still fall has made it overflow: that step is skipped and counted.
        """
        mixed = ((self.config.seed * 1_000_003 + seed) * 1_000_003 + self.num_updates) % 2**62
        spec = LossSpec(loss, reads, sequence_reads, with_entropy, group_field)
        collected: list[dict[str, Mean]] = []
        norms: list[float | None] = []  # None: a skipped step
        for epoch in range(num_epochs):
            for members in self._mini_batches(batch, spec, num_mini_batches, mixed + epoch):
                part = batch.select(members) if len(members) < batch.num_sequences else batch
                means, norm = self._step(part, spec)
                collected += means
                norms.append(norm)
        metrics = reduce_metrics(self.context, collected) | self._optimizer_metrics(norms)
        self.num_updates += 1
        self._weights_stepped()
        return metrics

    def _step(self, batch: Batch, spec: LossSpec) -> tuple[list[dict[str, Mean]], float | None]:
        """One optimizer step; returns its metrics on this rank, and the gradient's norm (None: skipped)."""
        engine = self.engine
        batch, micro_batches, output = self._plan(batch, spec)
        results = engine.forward_backward(batch, micro_batches, output)
        value = sum(result[0].double() for result in results) if results else torch.zeros((), dtype=torch.float64)
        values = {"loss": float(value), "gradient": engine.largest_gradient()}
        require_finite(engine.name, engine.num_steps, values)
        return self._with_total(results), engine.step()

    def measure(
        self,
        batch: Batch,
        loss: LossFunction,
        *,
        reads: tuple[str, ...] = (),
        sequence_reads: tuple[str, ...] = (),
        with_entropy: bool = False,
        group_field: str | None = None,
    ) -> dict[str, float]:
        """The metrics of ``loss`` on the whole batch, over all ranks, without a step. Arguments as for `optimize`."""
        spec = LossSpec(loss, reads, sequence_reads, with_entropy, group_field)
        batch, micro_batches, output = self._plan(batch, spec)
        results = self.engine.forward(batch, micro_batches, lambda *given: output(*given)[1])
        return reduce_metrics(self.context, self._with_total(results))

    def predictor(self, batch: Batch, with_entropy: bool) -> Predict:
        """(micro-batch, hidden states) -> the fields of `LossInputs` that come from the model."""
        raise NotImplementedError

    def _plan(self, batch: Batch, spec: LossSpec) -> tuple[Batch, list[MicroBatch], Output]:
        """The batch balanced over data-parallel ranks, its micro-batches, and the output function of each."""
        engine, by_tokens = self.engine, self.engine.micro_batching.packing
        balanced = balance(batch, self.context.dp_group, spec.groups(batch), by_tokens=by_tokens)
        batch = balanced.batch
        totals = global_totals(self.context, batch, balanced.units)
        micro_batches = plan_micro_batches(batch, engine, balanced.units)
        predict = self.predictor(batch, spec.with_entropy)
        output = loss_output(engine, batch, spec.loss, totals, spec.tokens, spec.sequences, predict)
        return batch, micro_batches, output

    def _mini_batches(self, batch: Batch, spec: LossSpec, parts: int, seed: int) -> list[list[int]]:
        units = unit_ids(batch.num_sequences, spec.groups(batch))
        counts = gather_objects(max(units, default=-1) + 1, self.context.dp_group)
        return split_mini_batches(units, counts, self.context.coordinates.dp, parts, seed)

    def _with_total(self, results: Sequence[tuple[Tensor, dict[str, Mean]]]) -> list[dict[str, Mean]]:
        """The metrics of all micro-batches, and their loss as one more."""
        if not results:
            return []
        device = self.engine.device
        value = torch.as_tensor(sum(result[0].double() for result in results), device=device)
        share = torch.ones((), device=device) / self.context.dp_cp_size
        return [*(dict(result[1]) for result in results), {"loss/total": Mean(value.float(), share)}]

    def _optimizer_metrics(self, norms: Sequence[float | None]) -> dict[str, float]:
        taken = [norm for norm in norms if norm is not None]
        metrics = {"optimizer/gradient_norm": sum(taken) / len(taken)} if taken else {}
        metrics["optimizer/learning_rate"] = self.engine.learning_rate
        metrics["optimizer/steps"] = float(len(taken))
        if self.engine.loss_scale is not None:
            metrics["optimizer/skipped_steps"] = float(len(norms) - len(taken))
            metrics["optimizer/loss_scale"] = self.engine.loss_scale
        return metrics

    # Weights that something else has changed

    def weights_changed(self) -> None:
        """To be called on every rank after anything but `optimize` has changed the weights: a checkpoint was loaded
        into the model, or steps were taken elsewhere. The optimizer's fp32 copies of bf16 and fp16 weights are then
        updated from the weights that it has not written itself."""
        self._follow_weights()

    def _follow_weights(self) -> None:
        if followed := self.engine.follow_weights():
            logger.info(
                "the optimizer's fp32 copies of %d weights on this rank were updated to their new values", followed
            )

    def _weights_stepped(self) -> None:
        """Called after each `optimize`."""

    # Saving: all called on every rank

    def save_pretrained(self, folder: str | Path, overwrite: bool = False, *, dtype: torch.dtype | None = None) -> Path:
        """Write a Hugging Face folder that `transformers`, SGLang and vLLM load as it is. Called on every rank.

        Args:
            dtype: of the saved weights; None = that of the folder, model or checkpoint that they came from, whatever
                precision they were trained in; of a job's own chunks their own.

        A value model becomes a sequence classifier with one label: its output is the value after the last token of a
        sequence that is not padding. The value head of a critic on shared weights goes into the sub-folder
        ``value_head``.
        """
        return save_pretrained(self.engine, self.tokenizer, Path(folder), overwrite, dtype)

    def save_adapters(self, folder: str | Path, base: str = "", overwrite: bool = False) -> Path:
        """Write the adapters alone as a PEFT folder, unmerged. Called on every rank.

        Args:
            base: name or folder of the frozen model, written for loaders of the adapters.

        Raises:
            ConfigError: there are no adapters, the model has a value head, or the folder exists.
        """
        return save_adapters(self.engine, Path(folder), base, overwrite)

    def describe_into(self, checkpoint: Path) -> None:
        """Write the description of the model into a checkpoint, for `megatron-rl convert`: config and tokenizer."""
        describe_checkpoint(self.engine, self.tokenizer, checkpoint)

    def state(self, prefix: str, loading: bool) -> dict[str, Any]:
        """What a resumed run needs; see `TrainingEngine.state`."""
        state = self.engine.state(prefix, loading)
        state["counters"] |= {"num_updates": self.num_updates, "engine": self.engine.kind}
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.engine.load_state(state)
        self.num_updates = state["counters"]["num_updates"]
