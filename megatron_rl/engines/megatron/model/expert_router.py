"""`ExpertRouter`: Megatron-Core's router for ways of choosing experts that its own fields do not express.

Megatron scores a group of experts by its best ``topk / group_topk``, always rescales sigmoids, and takes the softmax
behind the choice where weights are rescaled (megatron.core ``topk_routing_with_score_function``).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_rl.models.architecture import Experts
from megatron_rl.models.routing import choose_experts


def is_megatrons(experts: Experts) -> bool:
    """Whether Megatron-Core's own router chooses in this way."""
    rescaled = experts.normalize_weights
    if experts.num_groups > 1:
        usual = experts.group_scored_by == experts.experts_per_token // experts.chosen_groups
        return usual and rescaled == (experts.scoring == "sigmoid")
    return rescaled or experts.scoring == "softmax"


class ExpertRouter(TopKRouter):
    """`TopKRouter` with the choice of `models/routing.py`; its logits, bias and parameters stay Megatron's."""

    def __init__(self, *args: Any, experts: Experts, **options: Any) -> None:
        super().__init__(*args, **options)
        self.experts = experts

    def routing(self, logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """``[.., num_experts]`` -> weights, and which experts are chosen, both ``[tokens, num_experts]``."""
        flat = logits.view(-1, self.experts.num_experts)
        weights, chosen = choose_experts(flat.float(), self.experts, self.expert_bias)
        places = torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True)
        return torch.zeros_like(flat).scatter(1, chosen, weights.to(flat.dtype)), places
