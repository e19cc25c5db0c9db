"""KL estimators from samples, and the adaptive coefficient.

Estimators are those of J. Schulman, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html), for
KL(policy || reference) with tokens drawn from the policy and x = log policy - log reference:
k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
MAX_LOG_RATIO = 20.0  # exponents are clamped to +-20 (as in verl core_algos): exp(20) = 4.9e8 is still finite in fp32


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate, same shape, differentiable in ``logprobs``.

    In a loss on the policy's own samples, k1 has an expected gradient of zero, k2 has the gradient of
    KL(policy || reference) and k3 that of KL(reference || policy); in a reward k1 is the unbiased choice.

    k3 of a token is not capped below exp(20) - 21 = 4.85e8, which it reaches where the policy is 20 nats below the
    reference: one such token dominates a batch (verl holds k3 within +-10, TRL not at all). Beyond +-20 nats it is
    flat: a clamped exponential with a live linear part would push the wrong way.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return k3(-difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def k3(log_ratio: Tensor) -> Tensor:
    """exp(r) - 1 - r with the exponent clamped to +-20; exp(r) - 1 is one number, since near r = 0 it cancels."""
    return torch.expm1(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) - log_ratio


class AdaptiveKL:
    """Proportional controller that steers a measured KL to its target.

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (arXiv 1909.08593, section 2.2):
    e = clip(KL / target - 1, -0.2, 0.2), coefficient *= 1 + e * num_samples / horizon.
    """

    def __init__(self, coefficient: float, target: float, horizon: int) -> None:
        """``target`` in nats per response; ``horizon`` in samples."""
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, measured: float, num_samples: float) -> None:
        """Move the coefficient after ``num_samples`` responses with a mean KL of ``measured`` nats."""
        error = min(max(measured / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * num_samples / self.horizon
