"""Masked means and variances over the whole data-parallel world, and whitening with them.

Two passes (mean first, then squared distances from it), in float64, the variance unbiased: the same numbers whichever
way the sequences are spread over ranks, and no cancellation when the mean is large. Every rank must call these
functions, also one without any values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.devices import current_platform

WHITEN_EPSILON = 1e-8  # added to the variance, as in verl.utils.torch_functional.masked_whiten


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and unbiased variance of masked values over all data-parallel ranks; all zero when the mask is
    empty."""

    count: float
    mean: float
    variance: float

    @property
    def std(self) -> float:
        return self.variance**0.5


def sum_over_replicas(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of a small tensor over the group, ``[n]`` float64 in, the same out; None means a single process."""
    if group is None or group.size() == 1:
        return values
    total = values.to(current_platform().device, copy=True)  # the group's backend may not take host memory
    dist.all_reduce(total, group=group)
    return total.to(values.device)


def masked_moments(values: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None) -> Moments:
    """Moments of ``values[mask]`` over all ranks of ``group``.

    Args:
        values: any shape, floating point; entries outside the mask may be anything, NaN included.
        mask: bool, same shape.
        group: the data-parallel ranks; None for one process.
    """
    kept = values[mask.bool()].double()
    count, total = sum_over_replicas(torch.stack([kept.new_tensor(kept.numel()), kept.sum()]), group).tolist()
    mean = total / count if count else 0.0
    squares = sum_over_replicas((kept - mean).square().sum().reshape(1), group).item()
    return Moments(count=count, mean=mean, variance=squares / (count - 1) if count > 1 else 0.0)


def whiten(values: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``(x - mean) / sqrt(variance + 1e-8)`` on the mask, 0 elsewhere; shape and dtype of ``values``."""
    moments = masked_moments(values, mask, group)
    scaled = (values.double() - moments.mean) / (moments.variance + WHITEN_EPSILON) ** 0.5
    return torch.where(mask.bool(), scaled, 0.0).to(values.dtype)


def describe(name: str, values: Tensor, mask: Tensor, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Metrics ``<name>/mean`` and ``<name>/std`` over all ranks."""
    moments = masked_moments(values, mask, group)
    return {f"{name}/mean": moments.mean, f"{name}/std": moments.std}
