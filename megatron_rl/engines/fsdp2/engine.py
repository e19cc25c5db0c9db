"""`FSDP2Engine`: a Hugging Face module under PyTorch FSDP2 as a `TrainingEngine`, with what trains it.

Made by `build.py`. Weights are fp32 and cut over the data-parallel ranks; the forward pass gathers them layer by layer
in the engine's dtype. Micro-batches are run one after another, and every rank runs as many.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.data.packing import MicroBatch
from megatron_rl.engines.base import MicroBatching, Origin, Output, TrainingEngine
from megatron_rl.engines.fsdp2.head import Head
from megatron_rl.engines.fsdp2.lora import LoraAdapter
from megatron_rl.engines.fsdp2.optimizer import ShardedOptimizer
from megatron_rl.engines.fsdp2.shard_layout import fsdp2_layout
from megatron_rl.engines.fsdp2.sharded_module import ShardedModule
from megatron_rl.models import Architecture
from megatron_rl.models.module_architecture import ModuleTensor
from megatron_rl.parallel import ParallelContext
from megatron_rl.reshard import Layout


@dataclass
class FSDP2Engine(TrainingEngine):
    """One module over all data-parallel ranks."""

    kind = "fsdp2"
    sharded: ShardedModule
    context: ParallelContext
    architecture: Architecture
    module_tensors: tuple[ModuleTensor, ...]
    compute: torch.dtype
    head: Head | None  # None: a value model
    origin: Origin = field(default_factory=Origin)
    micro_batching: MicroBatching = field(default_factory=MicroBatching)
    shared_value_head: bool = False
    adapters: dict[str, LoraAdapter] = field(default_factory=dict)  # by the name of the frozen weight
    can_pack: bool = False
    optimizer: ShardedOptimizer | None = None  # None: frozen
    name: str = "model"
    num_steps: int = field(default=0, init=False)

    # What the model is

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    @property
    def dtype(self) -> torch.dtype:
        return self.compute

    # Weights

    @functools.cached_property
    def layout(self) -> Layout:
        return fsdp2_layout(self.module_tensors, self.context.world_size)

    def parameters(self) -> dict[str, nn.Parameter]:
        """DTensors; with a value head beside the output layer, which no layout names."""
        return self.sharded.named()

    def tensors(self) -> dict[str, Tensor]:
        """This rank's rows of each parameter, and the buffers that files hold."""
        state = self.sharded.module.state_dict(keep_vars=True)
        held = {name: local(parameter) for name, parameter in self.parameters().items()}
        return held | {one.shard.name: state[one.shard.name] for one in self.module_tensors if not one.trained}

    def sync_parameters(self) -> None:
        """Weights are gathered anew by each pass; of adapters, what merging needs of other ranks is gathered here."""
        for adapter in self.adapters.values():
            adapter.gather()

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """FSDP2 gathers from storage of its own, so that contents are exchanged, tensor by tensor."""
        self._exchange(weights)
        try:
            yield
        finally:
            self._exchange(weights)

    def _exchange(self, weights: Mapping[str, Tensor]) -> None:
        for name, own in self.tensors().items():
            kept = own.clone()
            own.copy_(weights[name])
            weights[name].copy_(kept)

    # Computing

    @property
    def packs(self) -> bool:
        return self.can_pack

    @torch.no_grad()
    def forward(self, batch: Batch, micro_batches: Sequence[MicroBatch], output: Output) -> list[Any]:
        self.sharded.eval()
        with self.sharded.settled():
            return [output(micro_batch, self._hidden(batch, micro_batch)) for micro_batch in micro_batches]

    def forward_backward(self, batch: Batch, micro_batches: Sequence[MicroBatch], output: Output) -> list[Any]:
        self.sharded.learn()
        self._optimizer.zero_grad()
        results = []
        with self.sharded.settled():
            for micro_batch in micro_batches:
                loss, result = output(micro_batch, self._hidden(batch, micro_batch))
                loss.backward()
                results.append(result)
        return results

    def _hidden(self, batch: Batch, micro_batch: MicroBatch) -> Tensor:
        """Padding stands behind each sequence, where causal attention does not see it, or is a sequence of its own."""
        device, shape = self.device, (micro_batch.rows, micro_batch.columns)
        edges, places = micro_batch.cu_seqlens, micro_batch.position_ids
        if edges is not None:  # padding may be longer than any sequence, and than the positions that a model has
            places = places.where(micro_batch.input_index >= 0, 0)
        found: Tensor = self.sharded(
            micro_batch.input_ids(batch).to(device),
            places.view(shape).to(device),
            None if edges is None else edges.to(device),
        )
        return found.flatten(0, 1)  # not inside, where FSDP2 hooks onto the tensor that comes out

    def token_logprobs(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert self.head is not None, "this model has no vocabulary"
        return self.head.token_logprobs(hidden, labels, temperature, with_entropy)

    def values(self, hidden: Tensor) -> Tensor:
        if self.sharded.value_head is not None:
            weight = self.sharded.value_head.weight
            return nn.functional.linear(hidden.float(), weight.float()).squeeze(-1)
        return super().values(hidden)

    # Optimising

    @property
    def _optimizer(self) -> ShardedOptimizer:
        assert self.optimizer is not None, "this model is frozen"
        return self.optimizer

    def largest_gradient(self) -> float:
        return self._optimizer.largest()

    def step(self) -> float | None:
        norm = self._optimizer.step(self.num_steps + 1)
        self.num_steps += 1
        return norm

    @property
    def learning_rate(self) -> float:
        return self._optimizer.rate

    # Checkpoints

    def state(self, prefix: str = "", loading: bool = False) -> dict[str, Any]:
        """Parameters and moments as DTensors, which any number of ranks can load. `StateStorage` names them by their
        places in the state of a run, so that they need no prefix."""
        state = self.sharded.module.state_dict(keep_vars=True)
        buffers = {one.shard.name: state[one.shard.name] for one in self.module_tensors if not one.trained}
        return {
            "model": {name: parameter.detach() for name, parameter in self.parameters().items()},
            "optimizer": self._optimizer.state(),
            "counters": {"num_steps": self.num_steps, "buffers": buffers, "lora_factor": self._lora_factors},
        }

    @property
    def _lora_factors(self) -> float | dict[str, float] | None:
        """One number where all adapters have the same."""
        factors = {name: adapter.factor for name, adapter in self.adapters.items()}
        return factors if len(set(factors.values())) > 1 else next(iter(factors.values()), None)

    def load_state(self, state: Mapping[str, Any]) -> None:
        if (found := state["counters"]["lora_factor"]) != self._lora_factors:
            raise ConfigError(
                f"{self.name}: the checkpoint's adapters have alpha / rank = {found}, this run's {self._lora_factors}: "
                "resume with the lora section that wrote it"
            )
        self.num_steps = state["counters"]["num_steps"]
        own = self.tensors()
        for name, tensor in {**state.get("model", {}), **state["counters"]["buffers"]}.items():
            own[name].copy_(tensor)
        self._optimizer.load_state(state.get("optimizer", {}), self.num_steps)
        self._optimizer.set_rate(self.num_steps)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter, without its graph."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found
