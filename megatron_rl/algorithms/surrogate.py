"""Policy losses per token or per sequence: pure functions of log-ratios and advantages.

``log_ratio`` is log(policy) - log(old policy); positive advantages make a response likelier. Each
function says which paper and equation it implements. Exponents are clamped to +-20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.algorithms.importance import bounded_exp


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A loss to be minimised, and where the clip has removed its gradient; both ``[n]``, per token or per sequence."""

    loss: Tensor
    clipped: Tensor  # bool


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Surrogate:
    """max(-A r, -A clip(r, 1 - low, 1 + high)): PPO (arXiv 1707.06347, eq. 7), low != high as in DAPO (2503.14476,
    eq. 10). With ``dual_clip`` c > 1 and A < 0 the loss is at most -c A (arXiv 1912.09729, "dual-clip PPO").
    """
    ratio = bounded_exp(log_ratio)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual_clip is None:
        return Surrogate(loss, clipped)
    ceiling = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
    return Surrogate(torch.minimum(loss, ceiling), clipped | (loss > ceiling))


def cispo_surrogate(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """-sg(clip(r, 1 - low, 1 + high)) A log(policy): CISPO (arXiv 2506.13585, eqs. 4 and 5). The bounds are relative
    to 1; every token keeps its gradient, only its weight is bounded."""
    ratio = bounded_exp(log_ratio.detach())
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return Surrogate(-weight * advantages * logprobs, weight != ratio)


def soft_gate_surrogate(log_ratio: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float) -> Surrogate:
    """-A sigmoid(tau (r - 1)) 4 / tau, tau chosen by the sign of A: SAPO (arXiv 2511.20347, section 3). Nothing is
    clipped; the gate's slope is 1 at r = 1 and fades away from it."""
    tau = torch.where(advantages > 0, advantages.new_tensor(tau_positive), advantages.new_tensor(tau_negative))
    gate = torch.sigmoid(tau * (bounded_exp(log_ratio) - 1.0)) * 4.0 / tau
    return Surrogate(-advantages * gate, torch.zeros_like(advantages, dtype=torch.bool))


def sequence_token_log_ratio(sequence_log_ratio: Tensor, logprobs: Tensor) -> Tensor:
    """The token form of a sequence ratio: value of the sequence, gradient of the token; GSPO-token (arXiv 2507.18071,
    eq. 14): s_t = sg(s) * policy_t / sg(policy_t)."""
    return sequence_log_ratio.detach() + logprobs - logprobs.detach()


def pessimistic_log_ratio(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Token log-ratios of GMPO (arXiv 2507.20673, section 3): held in [-low, high] where that lowers the objective, so
    the smaller of plain and held for A >= 0, the larger otherwise."""
    held = log_ratio.clamp(-clip_low, clip_high)
    return torch.where(advantages >= 0, torch.minimum(log_ratio, held), torch.maximum(log_ratio, held))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Surrogate:
    """(v - R)^2 / 2 per token; with ``clip``, the larger of that and of v held within +-clip of the old value, as in
    openai/baselines ppo2 (``vf_loss``) and verl (``compute_value_loss``)."""
    plain = 0.5 * (values - returns).square()
    if clip is None:
        return Surrogate(plain, torch.zeros_like(values, dtype=torch.bool))
    near = old_values + (values - old_values).clamp(-clip, clip)
    bounded = 0.5 * (near - returns).square()
    return Surrogate(torch.maximum(plain, bounded), bounded > plain)
