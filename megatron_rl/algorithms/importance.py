"""Log-ratios between policies, masked and bounded."""

from __future__ import annotations

from torch import Tensor

from megatron_rl.algorithms.kl import MAX_LOG_RATIO
from megatron_rl.workers.loss import LossInputs


def masked_log_ratio(inputs: LossInputs, numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator - denominator`` on the response mask and 0 elsewhere, also in the gradient; ``[num_tokens]``."""
    return inputs.masked(numerator) - inputs.masked(denominator)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp with the exponent clamped to +-20; the gradient is 0 beyond."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
