"""`ExpertLayer`: a routed mixture of gated-SiLU experts over one rank's part of the fused expert weights.

The part a rank holds follows from its shape: blocks of whole experts (expert parallel), of intermediate columns
(tensor parallel inside the experts), or both. The sum over all ranks is the caller's all-reduce.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_rl.models.architecture import Experts
from megatron_rl.rollout.local.sharding import TensorParallel


class ExpertLayer:
    """One layer's experts on this rank.

    Args:
        gate: router, ``[num_experts, hidden]``, replicated.
        w13: ``[local experts, 2 * local ffn, hidden]``, gate rows above up rows.
        w2: ``[local experts, hidden, local ffn]``.

    Raises:
        ValueError: there is a shared expert.
    """

    def __init__(
        self, experts: Experts, gate: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, tp: TensorParallel
    ) -> None:
        if experts.shared_ffn:
            raise ValueError("the local engine has no shared experts: roll this model out with SGLang")
        self.experts, self.gate, self.w13, self.w2 = experts, gate, w13, w2
        expert_parallel = experts.num_experts // len(w13)
        self.first = tp.rank // (tp.size // expert_parallel) * len(w13)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's part of the output, ``[tokens, hidden]`` like the input."""
        weights, chosen = self.route(hidden)
        output = torch.zeros_like(hidden)
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
        Softmax over all experts in fp32 first, then the choice (transformers `Qwen3MoeTopKRouter`)."""
        probs = torch.softmax(F.linear(hidden.to(self.gate.dtype), self.gate).float(), -1)
        weights, chosen = probs.topk(self.experts.experts_per_token, -1)
        if self.experts.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(hidden.dtype), chosen
