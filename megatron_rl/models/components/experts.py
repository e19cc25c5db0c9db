"""`ExpertMLP`: a router and the gated feed-forward networks that it chooses from, in the place of a `DenseMLP`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_rl.models.architecture import Experts
from megatron_rl.models.parameters import Parameter, Replicated
from megatron_rl.models.routed_experts import EXPERT_NAMES, ExpertNames, RoutedExperts


@dataclass(frozen=True, slots=True)
class ExpertMLP:
    """Softmax over all experts, the largest ``experts_per_token`` of them, their outputs weighted and summed."""

    hidden: int
    experts: Experts
    names: ExpertNames = EXPERT_NAMES
    router_dtype: torch.dtype | None = None  # of files and rollout engines; None = the model's

    fused_norm: ClassVar[str] = ""  # the router reads the norm's output, too, so Megatron never fuses it

    def parameters(self) -> Iterator[Parameter]:
        """Names lack the layer's prefix."""
        shape = (self.experts.num_experts, self.hidden)
        yield Replicated(
            self.names.router,
            shape,
            "mlp.router.weight",
            transformers_name=self.names.module_router,
            dtype=self.router_dtype,
        )
        yield RoutedExperts(self.experts.num_experts, self.experts.ffn, self.hidden, self.names)
