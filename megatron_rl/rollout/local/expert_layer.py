"""`ExpertLayer`: a routed mixture of gated-SiLU experts over one rank's part of the fused expert weights.

The part a rank holds follows from its shape: blocks of whole experts (expert parallel), of intermediate columns
(tensor parallel inside the experts), or both. A shared expert is cut over all tensor-parallel ranks. The sum over all
ranks is the caller's all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_rl.models.architecture import Experts
from megatron_rl.models.routing import choose_experts
from megatron_rl.rollout.local.sharding import TensorParallel


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """The expert that sees every token, on this rank."""

    run: Callable[[torch.Tensor], torch.Tensor]
    gate: torch.Tensor | None  # [1, hidden]: the output is multiplied with the sigmoid of this projection

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        output = self.run(hidden)
        return output if self.gate is None else output.mul_(F.linear(hidden, self.gate).sigmoid())


class ExpertLayer:
    """One layer's experts on this rank.

    Args:
        gate: router, ``[num_experts, hidden]``, replicated.
        w13: ``[local experts, 2 * local ffn, hidden]``, gate rows above up rows.
        w2: ``[local experts, hidden, local ffn]``.
        correction: ``[num_experts]`` fp32, replicated.
    """

    def __init__(
        self,
        experts: Experts,
        gate: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        tp: TensorParallel,
        correction: torch.Tensor | None = None,
        shared: SharedExpert | None = None,
    ) -> None:
        self.experts, self.gate, self.w13, self.w2 = experts, gate, w13, w2
        self.correction, self.shared = correction, shared
        expert_parallel = experts.num_experts // len(w13)
        self.first = tp.rank // (tp.size // expert_parallel) * len(w13)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's part of the output, ``[tokens, hidden]`` like the input."""
        weights, chosen = self.route(hidden)
        output = torch.zeros_like(hidden) if self.shared is None else self.shared(hidden)
        local = chosen - self.first
        for expert in range(len(self.w13)):
            tokens, places = (local == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            gate, up = F.linear(hidden[tokens], self.w13[expert]).chunk(2, -1)
            result = F.linear(F.silu(gate).mul_(up), self.w2[expert])
            output.index_add_(0, tokens, result * weights[tokens, places, None])
        return output

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (in the input's dtype) and indices of each token's experts, both ``[tokens, experts_per_token]``.
        Sigmoid routers multiply in fp32, others in the dtype of their weight, as those of `transformers` do."""
        dtype = torch.float32 if self.experts.scoring == "sigmoid" else self.gate.dtype
        logits = F.linear(hidden.to(dtype), self.gate.to(dtype)).float()
        weights, chosen = choose_experts(logits, self.experts, self.correction)
        return weights.to(hidden.dtype), chosen
