"""The logistic loss, accurate for arguments of any size."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def logistic_loss(x: Tensor) -> Tensor:
    """-log sigmoid(x) = log(1 + exp(-x)), any shape; `torch.nn.functional.softplus` is linear beyond 20."""
    return -functional.logsigmoid(x)


def smoothed_logistic(x: Tensor, smoothing: float) -> Tensor:
    """-(1 - s) log sigmoid(x) - s log sigmoid(-x)."""
    return (1 - smoothing) * logistic_loss(x) + smoothing * logistic_loss(-x)
