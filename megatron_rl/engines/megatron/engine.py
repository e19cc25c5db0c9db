"""`MegatronEngine`: Megatron-Core model chunks as a `TrainingEngine`, with where they stand and what trains them.

Made by `build.py`, from a job's own chunks and optimizer or from a Hugging Face model. Forward and backward run through
Megatron's pipeline schedule (`pipeline_schedule.py`), steps through Megatron's optimizer and learning-rate schedule.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.data.packing import Alignment, MicroBatch
from megatron_rl.devices import current_platform
from megatron_rl.engines.base import MicroBatching, Origin, Output, TrainingEngine
from megatron_rl.engines.megatron.checkpoint.sharded_state import load_sharded_state, sharded_state
from megatron_rl.engines.megatron.main_parameters import follow_weights
from megatron_rl.engines.megatron.model.decoder_layers import named_parameters
from megatron_rl.engines.megatron.model.lora_adapter import LoraAdapter
from megatron_rl.engines.megatron.model.model_chunk import (
    chunk_tensors,
    layer_indices,
    output_weight,
    supports_packing,
    unwrap,
)
from megatron_rl.engines.megatron.optimizer import can_fall, gradient_hooks, loss_scalers
from megatron_rl.engines.megatron.pipeline_schedule import run_schedule
from megatron_rl.models import Architecture, MegatronNaming, megatron_layout
from megatron_rl.models.naming import chunk_prefix
from megatron_rl.models.pipeline import stage_layers
from megatron_rl.ops.token_logprobs import token_logprobs
from megatron_rl.parallel import ParallelContext
from megatron_rl.reshard import Layout

logger = logging.getLogger(__name__)


@dataclass
class MegatronEngine(TrainingEngine):
    """Chunks of one rank, one per virtual pipeline stage, wrapped (DDP) or bare."""

    kind = "megatron"
    chunks: list[torch.nn.Module]
    context: ParallelContext
    architecture: Architecture
    padded_vocab: int  # rows of the embedding over all tensor-parallel ranks
    origin: Origin = field(default_factory=Origin)
    micro_batching: MicroBatching = field(default_factory=MicroBatching)
    shared_value_head: bool = False  # the last chunk has a value head beside its output layer
    adapters: dict[str, LoraAdapter] = field(default_factory=dict)  # LoRA: by shard name of the frozen weight
    optimizer: MegatronOptimizer | None = None  # None: frozen
    scheduler: OptimizerParamScheduler | None = None
    name: str = "model"
    num_steps: int = field(default=0, init=False)

    # What the model is

    @property
    def config(self) -> TransformerConfig:
        return unwrap(self.chunks[0]).config  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return current_platform().device

    @property
    def dtype(self) -> torch.dtype:
        return self.config.params_dtype

    @property
    def last_chunk(self) -> torch.nn.Module:
        """The bare chunk with the output layer, on the last pipeline stage."""
        return unwrap(self.chunks[-1])

    @property
    def last_prefix(self) -> str:
        """What precedes the names of the last chunk's tensors."""
        return chunk_prefix(len(self.chunks) - 1, len(self.chunks))

    def check_layers(self) -> None:
        """Raise ConfigError unless each chunk holds the layers that the layout says it does."""
        sizes, at = self.context.sizes, self.context.coordinates
        for stage, chunk in enumerate(self.chunks):
            expected = list(stage_layers(self.architecture.num_layers, sizes.pp, sizes.vpp, at.pp, stage))
            layers = list(layer_indices(chunk))
            if layers != expected:
                raise ConfigError(
                    f"pipeline stage {at.pp} chunk {stage} holds layers {layers}, expected {expected}: build the model "
                    "with evenly divided stages (the first stages one layer longer where they do not divide)"
                )

    # Weights

    @functools.cached_property
    def naming(self) -> MegatronNaming:
        return MegatronNaming.detect(self.tensors())

    @functools.cached_property
    def layout(self) -> Layout:
        return self.layout_of(output_layer=True)

    def layout_of(self, output_layer: bool) -> Layout:
        """The same with or without the output layer."""
        architecture = self.architecture if output_layer else replace(self.architecture, value_model=False)
        grid = self.context.grid
        return megatron_layout(architecture, grid, self.padded_vocab, self.naming, output_layer=output_layer)

    def tensors(self) -> dict[str, Tensor]:
        return chunk_tensors(self.chunks)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            chunk_prefix(index, len(self.chunks)) + name: parameter
            for index, chunk in enumerate(self.chunks)
            for name, parameter in named_parameters(unwrap(chunk))
        }

    def sync_parameters(self) -> None:
        """Finish a pending all-gather of updated parameters (distributed optimizer with overlap)."""
        for chunk in self.chunks:
            if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]

    def follow_weights(self) -> int:
        return 0 if self.optimizer is None else follow_weights(self.optimizer)

    # Computing

    @functools.cached_property
    def packs(self) -> bool:
        """Megatron's plain `DotProductAttention` does not."""
        return all(supports_packing(chunk) for chunk in self.chunks)

    @property
    def alignment(self) -> Alignment:
        sizes = self.context.sizes
        return Alignment(sizes.cp, self.context.coordinates.cp, sizes.tp if self.config.sequence_parallel else 1)

    @property
    def micro_batch_multiple(self) -> int:
        """The interleaved schedule wants a multiple of the pipeline stages."""
        return self.context.sizes.pp if self.context.sizes.vpp > 1 else 1

    @torch.no_grad()
    def forward(self, batch: Batch, micro_batches: Sequence[MicroBatch], output: Output) -> list[Any]:
        for chunk in self.chunks:
            chunk.eval()
        return run_schedule(self.chunks, self.context, batch, micro_batches, output, backward=False)

    def forward_backward(self, batch: Batch, micro_batches: Sequence[MicroBatch], output: Output) -> list[Any]:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
            chunk.train()
        self._optimizer.zero_grad()
        with gradient_hooks(self.chunks, self._optimizer):
            return run_schedule(self.chunks, self.context, batch, micro_batches, output, backward=True)

    def token_logprobs(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        weight = output_weight(self.last_chunk)
        return token_logprobs(
            hidden,
            weight,
            labels,
            vocab_start=self.context.coordinates.tp * weight.shape[0],
            vocab_size=self.architecture.vocab,
            temperature=temperature,
            softcap=self.architecture.logit_softcap,
            group=self.context.tp_group if self.context.sizes.tp > 1 else None,
            with_entropy=with_entropy,
        )

    def values(self, hidden: Tensor) -> Tensor:
        if self.shared_value_head:
            return self.last_chunk.value_head.beside_logits(hidden)  # type: ignore[operator,union-attr]
        return super().values(hidden)

    # Optimising

    @property
    def _optimizer(self) -> MegatronOptimizer:
        assert self.optimizer is not None, "this model is frozen"
        return self.optimizer

    def largest_gradient(self) -> float:
        if getattr(self._optimizer.config, "fp16", False):
            return 0.0
        found = (getattr(parameter, "main_grad", None) for chunk in self.chunks for parameter in chunk.parameters())
        gradients = [gradient for gradient in found if gradient is not None]
        return float(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)) if gradients else 0.0

    def step(self) -> float | None:
        """A skipped step leaves weights and schedule where they are, as in Megatron-LM's own loop."""
        optimizer = self._optimizer
        at_limit = all(not can_fall(scaler) for scaler in loss_scalers(optimizer))
        if self.scheduler is not None:
            self.scheduler.step(increment=1)
        updated, norm, _ = optimizer.step()
        if updated:
            self.num_steps += 1
            return float(norm or 0.0)
        if self.scheduler is not None:
            self.scheduler.step(increment=-1)
        if at_limit:
            raise FloatingPointError(
                f"{self.name}: the gradient of optimizer step {self.num_steps} is not finite, and the loss scale "
                f"({float(optimizer.get_loss_scale()):g}) cannot fall: lower the learning rate, train in bf16, or "
                "look for NaN rewards or log-probabilities in this step's metrics"
            )
        logger.info("%s: an overflow at this loss scale, step skipped", self.name)
        return None

    @property
    def learning_rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def loss_scale(self) -> float | None:
        return float(self._optimizer.get_loss_scale()) if loss_scalers(self._optimizer) else None

    # Checkpoints

    def state(self, prefix: str = "", loading: bool = False) -> dict[str, Any]:
        self.sync_parameters()
        state = sharded_state(self.chunks, self._optimizer, self.scheduler, prefix, loading)
        state["counters"]["num_steps"] = self.num_steps
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        load_sharded_state(self.chunks, self._optimizer, self.scheduler, self.name, state)
        self.num_steps = state["counters"]["num_steps"]
