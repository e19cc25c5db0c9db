"""`TrainedWorker`: what `Actor` and `Critic` share, a `TrainableModel` and the call that optimises it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelContext
from megatron_rl.weights.hf_folder import HFDescription
from megatron_rl.weights.hf_out import save_hf
from megatron_rl.weights.peft_out import Part, assembled, parts_of, write_peft
from megatron_rl.weights.value_head_file import SECOND_HEAD, write_value_head
from megatron_rl.workers.heads import LossFunction
from megatron_rl.workers.main_parameters import follow_weights
from megatron_rl.workers.megatron_model import MegatronModel
from megatron_rl.workers.settings import WorkerSettings
from megatron_rl.workers.trainable import Optimization, Scorer, TrainableModel

logger = logging.getLogger(__name__)


class TrainedWorker:
    """A role around a model in training; a subclass says what its loss sees."""

    settings: WorkerSettings
    trainable: TrainableModel
    tokenizer: Any

    @property
    def model(self) -> MegatronModel:
        return self.trainable.model

    @property
    def context(self) -> ParallelContext:
        return self.model.context

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
        """Take ``num_epochs * num_mini_batches`` optimizer steps on ``loss``; returns metrics over all ranks.

        Args:
            loss: pure function of `LossInputs`, run on the last pipeline stage for each micro-batch.
            reads, sequence_reads: token and sequence fields of the batch that the loss reads.
            with_entropy: whether the loss reads entropies.
            group_field: sequence field; sequences with equal values stay in one micro-batch.
            seed: of the order of mini-batches; the worker's own seed and its number of updates are mixed in.

        Raises:
            FloatingPointError: loss or gradient is not finite.
        """
        mixed = (self.settings.seed * 1_000_003 + seed) * 1_000_003 + self.trainable.num_updates
        how = Optimization(num_epochs, num_mini_batches, reads, sequence_reads, group_field, mixed % 2**62)
        metrics = self.trainable.optimize(batch, loss, how, lambda part: self.scorer(part, with_entropy))
        self._weights_stepped()
        return metrics

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
        how = Optimization(reads=reads, sequence_reads=sequence_reads, group_field=group_field)
        return self.trainable.measure(batch, loss, how, lambda part: self.scorer(part, with_entropy))

    def scorer(self, batch: Batch, with_entropy: bool) -> Scorer:
        """(micro-batch, output of the last stage) -> the fields of `LossInputs` that come from the model."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, overwrite: bool = False, *, dtype: torch.dtype | None = None) -> Path:
        """Write a Hugging Face folder that `transformers`, SGLang and vLLM load as it is. Called on every rank.

        Args:
            dtype: of the weights there; None = that of the folder, model or checkpoint which they came from, whatever
                precision they were trained in. A job's own chunks have no such source: their own dtype.

        A value model becomes a sequence classifier with one label: its score is the value after the last token of a
        sequence that is not padding. The value head of a critic on shared weights goes into the sub-folder
        ``value_head``.
        """
        self.model.sync_parameters()
        return save_hf(
            self.model.layout,
            self.model.published(),
            self.model.architecture,
            Path(folder),
            rank=self.context.rank,
            tokenizer=self.tokenizer,
            hf_config=self.model.hf_config,
            generation_config=self.model.generation,
            dtype=dtype or self.model.source_dtype,
            overwrite=overwrite,
            beside=self._write_second_head,
        )

    def save_adapters(self, folder: str | Path, base: str = "", overwrite: bool = False) -> Path:
        """Write the adapters alone as a PEFT folder, unmerged. Called on every rank.

        Args:
            base: name or folder of the frozen model, for whoever loads the adapters.

        Raises:
            ConfigError: there are no adapters, a value head belongs to them, or the folder exists.
        """
        model, at, folder = self.model, self.context.coordinates, Path(folder)
        if not model.adapters or model.value_head:
            raise ConfigError("save_adapters is for a policy with adapters (LoRA): use save_pretrained")
        model.sync_parameters()
        own: list[Part] = []
        if at.dp == at.cp == 0:
            shards = {shard.name: shard for shard in model.layout.shards(self.context.rank)}
            for name, adapter in model.adapters.items():
                own += parts_of(shards[name], adapter.a, adapter.b, adapter.row_parallel)
        parts = [part for parts in self.context.gather_objects(own) for part in parts]
        with self.context.attempt("saving adapters"):
            if self.context.rank == 0:
                write_peft(folder, assembled(parts), next(iter(model.adapters.values())).facts, base, overwrite)
        return folder

    def _write_second_head(self, folder: Path) -> None:
        """On one of the ranks that hold it."""
        at, context = self.context.coordinates, self.context
        if self.model.second_head and (at.tp, at.pp, at.cp, at.dp) == (0, context.sizes.pp - 1, 0, 0):
            write_value_head(folder, self.model.tensors()[self.model.last_prefix + SECOND_HEAD])

    def describe_into(self, checkpoint: Path) -> None:
        """Write into a Megatron checkpoint what model it holds, for `megatron-rl convert`: config and tokenizer."""
        model = self.model
        description = HFDescription(model.architecture, model.hf_config, self.tokenizer, model.generation)
        description.write_into(checkpoint, model.config.params_dtype)

    def weights_changed(self) -> None:
        """Say, on every rank, that something else than `optimize` has changed the weights: a checkpoint was loaded into
        the model, or other steps were taken. The optimizer's fp32 copies of bf16 and fp16 weights then follow those
        that were not written by itself."""
        self._follow_weights()

    def _follow_weights(self) -> None:
        if followed := follow_weights(self.trainable.optimizer):
            logger.info("the optimizer's fp32 copies of %d weights on this rank follow the new values", followed)

    def _weights_stepped(self) -> None:
        """Called after each `optimize`."""
