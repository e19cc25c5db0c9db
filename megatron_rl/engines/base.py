"""`TrainingEngine`: all that the roles (`Actor`, `Critic`, `Reference`, `RewardModel`) know of what trains a model.

    micro_batches = plan_micro_batches(batch, engine)
    results = engine.forward_backward(batch, micro_batches, output)     # gradients, summed over all ranks
    norm = engine.step()                                                # optimizer and schedule

An engine is one model on this rank: its part of the weights, where that part sits (`layout`), and, unless it is frozen,
what optimises it. Every rank of the job holds one and makes the same calls in the same order. `tests/engines` has the
contract as tests, and a plain torch engine that holds it.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.data.packing import Alignment, MicroBatch
from megatron_rl.models import Architecture
from megatron_rl.parallel import ParallelContext
from megatron_rl.reshard import Layout, LazyTensor, Readable, WireFormat

if TYPE_CHECKING:
    from megatron_rl.models.hf_config import GenerationFile, HFConfig

# (micro-batch, hidden states [n, hidden] of its n positions, dtype of the weights) -> what the caller wants. Where the
# model's output layer is a value head, the values [n, 1] fp32 stand in place of hidden states.
Output = Callable[[MicroBatch, Tensor], Any]


@dataclass(frozen=True, slots=True)
class MicroBatching:
    """How a batch is cut into micro-batches."""

    token_budget: int = 4096  # tokens of one micro-batch over all context-parallel ranks
    packing: bool = True  # False: padded rows
    rows: int | None = None  # sequences of a padded micro-batch; None = as many as the token budget holds


@dataclass(frozen=True)
class Origin:
    """Where the weights came from; unknown for a job's own model chunks."""

    hf_config: HFConfig | None = None
    generation: GenerationFile | None = None
    dtypes: WireFormat | None = None  # of the weights there
    lacks_value_head: bool = False  # the model has a value head and the source has none: it starts at zero


class LowRank(Protocol):
    """The adapter of one frozen weight ``W [out, in]``: the model computes with ``W + factor * B A``."""

    row_parallel: bool  # inputs are split over tensor-parallel ranks, not outputs
    enabled: bool  # off, it adds nothing

    def merged(self, weight: Tensor) -> Tensor:
        """This rank's part of W with the update in it: a new tensor of the same dtype."""

    dropout: float  # share of the inputs that are zeroed in training

    def matrices(self, tensor: str | None = None) -> tuple[Tensor, Tensor, float]:
        """A, B and factor on this rank, of all of W or of the rows that are those of a logical tensor."""


class TrainingEngine(abc.ABC):
    """One model on one rank. Every rank calls "collective" methods together; the others need no communication."""

    kind: ClassVar[str] = "other"  # whose states only such an engine can load
    name: str = "model"  # the role's, in errors
    context: ParallelContext
    architecture: Architecture
    micro_batching: MicroBatching
    origin: Origin
    shared_value_head: bool = False  # a value head beside the output layer, for a critic on the policy's weights
    adapters: Mapping[str, LowRank] = MappingProxyType({})  # LoRA's on this rank, by the frozen weight's name
    num_steps: int = 0  # optimizer steps taken so far; a skipped one does not count

    # What the model is

    @property
    def device(self) -> torch.device:
        """Of the weights, and of the hidden states that an `Output` gets."""
        return next(iter(self.tensors().values())).device

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the weights and of the forward pass."""

    @property
    def value_model(self) -> bool:
        """Whether the output layer is one number a position instead of the vocabulary."""
        return self.architecture.value_model

    # Weights

    @property
    @abc.abstractmethod
    def layout(self) -> Layout:
        """Which parts of the logical tensors every rank holds, under which names; the same value on all ranks."""

    @abc.abstractmethod
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's weights by the names of `layout`."""

    def tensors(self) -> dict[str, Tensor]:
        """The same detached: views that see every later update."""
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    def published(self) -> dict[str, Readable]:
        """The weights as rollout engines and exports get them. Each adapter is merged when its weight is read: there is
        never a second copy of the model."""
        tensors = self.tensors()
        return tensors | {
            name: LazyTensor(tensors[name], functools.partial(adapter.merged, tensors[name]))
            for name, adapter in self.adapters.items()
        }

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While open, the model computes with ``weights``, named and shaped as `tensors`; afterwards with its own
        again. They may lie on another device, and are not to be read in the meantime. Collective."""
        self.sync_parameters()
        parameters = self.parameters()
        own = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = weights[name].to(parameter.device, non_blocking=True)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]

    @abc.abstractmethod
    def sync_parameters(self) -> None:
        """Wait for an overlapped all-gather of updated parameters; call it before weights are read. Collective."""

    def follow_weights(self) -> int:
        """Refresh the optimizer's fp32 copies of weights that something else has written, such as a loaded checkpoint.
        Returns how many were changed on this rank."""
        return 0

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """While open, the model computes with its frozen weights alone, without adapters."""
        for adapter in self.adapters.values():
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in self.adapters.values():
                adapter.enabled = True

    # Computing: all collective

    @property
    @abc.abstractmethod
    def packs(self) -> bool:
        """Whether it takes packed micro-batches; otherwise rows are padded."""

    @property
    def alignment(self) -> Alignment:
        """What sequence lengths must be multiples of, and which positions of a sequence this rank computes."""
        return Alignment()

    @property
    def micro_batch_multiple(self) -> int:
        """The number of micro-batches of one pass must be a multiple of this."""
        return 1

    @abc.abstractmethod
    def forward(self, batch: Batch, micro_batches: Sequence[MicroBatch], output: Output) -> list[Any]:
        """All micro-batches in evaluation mode, without gradients.

        Args:
            micro_batches: at least one; all of one shape, and as many on every rank (`plan_micro_batches`).
            output: called for each micro-batch where the last layer is.

        Returns:
            What ``output`` returned, in order; empty on ranks without the last layer.
        """

    @abc.abstractmethod
    def forward_backward(self, batch: Batch, micro_batches: Sequence[MicroBatch], output: Output) -> list[Any]:
        """All micro-batches in training mode, forward and backward, from gradients of zero.

        Args:
            output: returns ``(loss, result)``. The loss that is differentiated is the sum of ``loss`` over
                micro-batches and over data- and context-parallel ranks: nothing is averaged.

        Returns:
            The results, in order; empty on ranks without the last layer. Gradients are reduced over all ranks.
        """

    @abc.abstractmethod
    def token_logprobs(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of ``labels`` ``[n]`` int64 and entropies from hidden states ``[n, hidden]``: ``[n]`` fp32,
        differentiable. For use in an `Output`; over the vocabulary without padding, logits divided by ``temperature``.
        """

    def values(self, hidden: Tensor) -> Tensor:
        """The value head's output for the hidden states that an `Output` gets: ``[n]`` fp32, differentiable."""
        assert self.value_model, "this model has no value head"
        return hidden.squeeze(-1).float()

    # Optimising: all collective; a frozen engine has none of it

    @abc.abstractmethod
    def largest_gradient(self) -> float:
        """Magnitude of the largest element of this rank's gradients; not finite where any is not. 0 where `step` finds
        overflows itself (loss scaling)."""

    @abc.abstractmethod
    def step(self) -> float | None:
        """Clip gradients, then one step of the optimizer and of the learning-rate schedule.

        Returns:
            The gradient's global L2 norm before clipping; None: the step was skipped because the
            gradient overflowed, and the loss scale was lowered. Weights and schedule are unchanged.

        Raises:
            FloatingPointError: it overflowed, and the loss scale is at its minimum. Nothing has changed.
        """

    @property
    @abc.abstractmethod
    def learning_rate(self) -> float:
        """Of the next step."""

    @property
    def loss_scale(self) -> float | None:
        """What fp16 losses are multiplied with; None where there is no loss scaling."""
        return None

    # Checkpoints: collective

    @abc.abstractmethod
    def state(self, prefix: str = "", loading: bool = False) -> dict[str, Any]:
        """What a resumed run needs: weights, optimizer, schedule and ``counters``, for Megatron-Core's
        `dist_checkpointing`: sharded tensors or DTensors, which any layout can load, and plain values that are equal
        on all ranks.

        Args:
            prefix: of the names of tensors in the file, so that several models fit into one.
            loading: the result is what to load into, rather than what to write.
        """

    @abc.abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
