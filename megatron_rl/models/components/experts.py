"""`ExpertMLP`: a router and the gated feed-forward networks that it chooses from, in the place of a `DenseMLP`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_rl.models.architecture import Experts
from megatron_rl.models.parameters import GateUp, InputColumns, Parameter, Replicated, Rows
from megatron_rl.models.routed_experts import EXPERT_NAMES, ExpertNames, RoutedExperts
from megatron_rl.models.transposed_experts import ExpertBiases, TransposedExperts


@dataclass(frozen=True, slots=True)
class ExpertMLP:
    """The outputs of the experts that `models/routing.py` chooses, weighted and summed, and that of a shared expert."""

    hidden: int
    experts: Experts
    names: ExpertNames = EXPERT_NAMES
    router_dtype: torch.dtype | None = None  # of files and rollout engines; None = the model's
    rollout_router_dtype: torch.dtype | None = None  # of rollout engines, where files have another

    fused_norm: ClassVar[str] = ""  # the router reads the norm's output, too, so Megatron never fuses it

    def parameters(self) -> Iterator[Parameter]:
        """Names lack the layer's prefix."""
        experts, names = self.experts, self.names
        yield Replicated(
            names.router,
            (experts.num_experts, self.hidden),
            "mlp.router.weight",
            transformers_name=names.module_router,
            dtype=self.router_dtype,
            rollout_dtype=self.rollout_router_dtype,
        )
        if experts.correction_bias:
            shape = (experts.num_experts,)
            yield Replicated(names.correction_bias, shape, "mlp.router.expert_bias", dtype=torch.float32)
        if experts.biased:
            yield Replicated("mlp.router.bias", (experts.num_experts,), "mlp.router.bias")
            yield TransposedExperts(experts.num_experts, experts.ffn, self.hidden)
            yield ExpertBiases(experts.num_experts, experts.ffn, self.hidden)
        else:
            yield RoutedExperts(experts.num_experts, experts.ffn, self.hidden, names)
        if experts.shared_ffn:
            yield from self._shared(experts.shared_ffn)
        if experts.shared_gate:
            yield Replicated(names.shared_gate, (1, self.hidden), "mlp.shared_experts.gate_weight")

    def _shared(self, ffn: int) -> Iterator[Parameter]:
        """The shared expert, which lies on all tensor-parallel ranks wherever the routed ones are."""
        shared, megatron = self.names.shared, "mlp.shared_experts."
        gate, up = (Rows(f"{shared}{half}_proj.weight", 0, ffn) for half in ("gate", "up"))
        yield GateUp(gate, up, self.hidden, megatron + "linear_fc1.weight", shared + "gate_up_proj.weight")
        yield InputColumns(shared + "down_proj.weight", self.hidden, ffn, megatron + "linear_fc2.weight")
