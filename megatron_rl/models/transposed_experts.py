"""`TransposedExperts` and `ExpertBiases`: the experts of gpt-oss, whose files hold all of a layer in four tensors.

A matrix multiplies from the right, ``[inputs, outputs]``, and of the outputs of ``gate_up_proj`` every other one is a
gate. Parts of it are rectangles only in that orientation, so Megatron's side (our own `ClampedExperts`) and the
rollout's keep it; SGLang does with ``moe_runner_backend=triton_kernel``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from megatron_rl.models.parameters import Parameter, Place, Shape
from megatron_rl.models.routed_experts import local_experts
from megatron_rl.reshard.layout import Shard, Span, block

EXPERTS = "mlp.experts."  # in files, in SGLang and in the memory of `transformers`
LAYERS = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}  # in files -> in Megatron


@dataclass(frozen=True, slots=True)
class TransposedExperts(Parameter):
    """The matrices of ``num_experts`` gated feed-forward networks; expert parallelism gives each rank a block
    of them. Megatron-Core refuses to cut experts with biases, so they are whole there."""

    num_experts: int
    ffn: int
    hidden: int

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return [(EXPERTS + tensor, (self.num_experts, *self._sizes(tensor))) for tensor in LAYERS]

    def _sizes(self, tensor: str) -> tuple[int, int]:
        """Inputs and outputs."""
        return (self.hidden, 2 * self.ffn) if tensor == "gate_up_proj" else (self.ffn, self.hidden)

    def megatron(self, at: Place) -> Iterator[Shard]:
        for local, expert in enumerate(local_experts(self.num_experts, at)):
            for tensor, layer in LAYERS.items():
                inputs, outputs = self._sizes(tensor)
                span = Span(f"{at.hf}{EXPERTS}{tensor}", expert * inputs, (expert + 1) * inputs, 0, outputs, 0, 0)
                yield Shard(megatron_name(at, local, layer) + "weight", (inputs, outputs), (span,))

    def rollout(self, at: Place) -> Iterator[Shard]:
        """``w13_weight`` [E_local, H, 2*I/moe_tp], ``w2_weight`` [E_local, I/moe_tp, H]."""
        experts = local_experts(self.num_experts, at)
        start, stop = block(self.ffn, at.expert_tp.index, at.expert_tp.count, "the expert feed-forward size")
        count, width, hf, local = len(experts), stop - start, at.hf + EXPERTS, at.local + EXPERTS
        rows = experts.start * self.hidden, experts.stop * self.hidden
        up = Span(hf + "gate_up_proj", *rows, 2 * start, 2 * stop, 0, 0)
        yield Shard(local + "w13_weight", (count, self.hidden, 2 * width), (up,))
        down = tuple(
            Span(hf + "down_proj", expert * self.ffn + start, expert * self.ffn + stop, 0, self.hidden, row, 0)
            for row, expert in zip(range(0, count * width, width), experts, strict=True)
        )
        yield Shard(local + "w2_weight", (count, width, self.hidden), down)


@dataclass(frozen=True, slots=True)
class ExpertBiases(Parameter):
    """Their biases: rows in Megatron; fp32 in SGLang, where that of the output is on the first of the ranks that share
    an expert, and zero on the others."""

    num_experts: int
    ffn: int
    hidden: int
    rollout_dtype: torch.dtype | None = torch.float32

    def logical(self) -> Iterable[tuple[str, Shape]]:
        return [(f"{EXPERTS}{tensor}_bias", (self.num_experts, self._outputs(tensor))) for tensor in LAYERS]

    def _outputs(self, tensor: str) -> int:
        return 2 * self.ffn if tensor == "gate_up_proj" else self.hidden

    def megatron(self, at: Place) -> Iterator[Shard]:
        for local, expert in enumerate(local_experts(self.num_experts, at)):
            for tensor, layer in LAYERS.items():
                span = Span(f"{at.hf}{EXPERTS}{tensor}_bias", expert, expert + 1, 0, self._outputs(tensor), 0, 0)
                yield Shard(megatron_name(at, local, layer) + "bias", (1, self._outputs(tensor)), (span,))

    def rollout(self, at: Place) -> Iterator[Shard]:
        experts, hf, local = local_experts(self.num_experts, at), at.hf + EXPERTS, at.local + EXPERTS
        start, stop = block(2 * self.ffn, at.expert_tp.index, at.expert_tp.count, "the expert feed-forward size")
        up = Span(hf + "gate_up_proj_bias", experts.start, experts.stop, start, stop, 0, 0)
        yield Shard(local + "w13_weight_bias", (len(experts), stop - start), (up,))
        down = Span(hf + "down_proj_bias", experts.start, experts.stop, 0, self.hidden, 0, 0)
        spans = () if at.expert_tp.index else (down,)
        yield Shard(local + "w2_weight_bias", (len(experts), self.hidden), spans, like=down.tensor)


def is_transposed(tensor: str) -> bool:
    """Whether a logical tensor holds matrices that multiply from the right."""
    return tensor.endswith(tuple(EXPERTS + name for name in LAYERS))


def megatron_name(at: Place, local: int, layer: str) -> str:
    """What precedes the names of a layer of a rank's ``local``-th expert in Megatron."""
    return f"{at.local}mlp.experts.local_experts.{local}.{layer}."
