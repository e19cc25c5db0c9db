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
    KL(policy || reference) and k3 that of KL(reference || policy); in a reward k1 is the unbiased choice. Beyond
    +-20 nats k3 is flat: a clamped exponential with a live linear part would push the wrong way.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.exp(-difference) - 1.0 + difference


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
