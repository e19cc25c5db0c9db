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

from megatron_rl.models.activations import clamped_gate
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


@dataclass(frozen=True, slots=True)
class ExpertBiases:
    """Biases of gpt-oss, whose expert matrices multiply from the right."""

    router: torch.Tensor  # [num_experts]
    w13: torch.Tensor  # [local experts, 2 * local ffn], gates and ups in turn
    w2: torch.Tensor  # [local experts, hidden], zero on all but the first of the ranks that share an expert


class ExpertLayer:
    """One layer's experts on this rank.

    Args:
        gate: router, ``[num_experts, hidden]``, replicated.
        w13: ``[local experts, 2 * local ffn, hidden]``, gate rows above up rows.
        w2: ``[local experts, hidden, local ffn]``. With ``biases`` both are transposed, gates and ups in turn.
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
        biases: ExpertBiases | None = None,
    ) -> None:
        self.experts, self.gate, self.w13, self.w2 = experts, gate, w13, w2
        self.correction, self.shared, self.biases = correction, shared, biases
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
            result = self._run(expert, hidden[tokens])
            output.index_add_(0, tokens, result * weights[tokens, places, None])
        return output

    def _run(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        if self.biases is None or self.experts.clamp is None:
            gate, up = F.linear(hidden, self.w13[expert]).chunk(2, -1)
            return F.linear(F.silu(gate).mul_(up), self.w2[expert])
        up_bias, down_bias = (bias[expert].to(hidden.dtype) for bias in (self.biases.w13, self.biases.w2))
        gates_and_ups = hidden @ self.w13[expert] + up_bias
        return clamped_gate(gates_and_ups, self.experts.clamp) @ self.w2[expert] + down_bias

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (in the input's dtype) and indices of each token's experts, both ``[tokens, experts_per_token]``.
        Sigmoid routers multiply in fp32, others in the dtype of their weight, as those of `transformers` do."""
        dtype = torch.float32 if self.experts.scoring == "sigmoid" else self.gate.dtype
        bias = None if self.biases is None else self.biases.router.to(dtype)
        logits = F.linear(hidden.to(dtype), self.gate.to(dtype), bias).float()
        weights, chosen = choose_experts(logits, self.experts, self.correction)
        return weights.to(hidden.dtype), chosen
