"""Which experts a token goes to, and with what weights: the one definition for all mixtures of experts here.

Follows transformers' ``MixtralTopKRouter``, ``DeepseekV2TopkRouter`` and ``DeepseekV3TopkRouter`` (DeepSeek-V2,
arXiv:2405.04434, section 2.2.2; DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.models.architecture import Experts

TINY = 1e-20  # added to a sum of sigmoids that is divided by


def choose_experts(logits: Tensor, experts: Experts, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights and indices of each token's experts, both ``[tokens, experts_per_token]``.

    Args:
        logits: of the router, ``[tokens, num_experts]`` fp32.
        correction: ``[num_experts]`` fp32, with `Experts.correction_bias`.
    """
    scores = logits.softmax(-1) if experts.scoring == "softmax" else logits.sigmoid()
    preference = scores if correction is None else scores + correction
    if experts.num_groups > 1:
        preference = _within_groups(preference, experts)
    chosen = preference.topk(experts.experts_per_token, -1).indices
    weights = scores.gather(-1, chosen)
    if experts.normalize_weights:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total if experts.scoring == "softmax" else total + TINY)
    return weights * experts.scaling, chosen


def _within_groups(preference: Tensor, experts: Experts) -> Tensor:
    """``preference`` of the experts in the best groups, minus infinity in the others."""
    grouped = preference.unflatten(-1, (experts.num_groups, -1))
    best = grouped.topk(experts.group_scored_by, -1).values.sum(-1).topk(experts.chosen_groups, -1).indices
    left_out = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=grouped.device).scatter(-1, best, False)
    return grouped.masked_fill(left_out[..., None], float("-inf")).flatten(-2)
