"""f-divergences in the place of DPO's reverse KL."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
MAX_EXPONENT = 80.0  # exp of it is finite in fp32; beyond, the slope is 0


def f_slope(log_ratio: Tensor, divergence: FDivergence, alpha: float) -> Tensor:
    """f'(u) of u = policy / reference, 0 at u = 1: what beta is multiplied with in f-DPO (arXiv 2309.16240, table 1).

    reverse_kl: log u. forward_kl: 1 - 1 / u. js: log(2 u / (1 + u)). alpha: (1 - u^-alpha) / alpha, between the first
    (alpha towards 0) and the second (towards 1); TRL's coefficient is 1 - alpha.
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js":
        return math.log(2.0) + functional.logsigmoid(log_ratio)
    power = alpha if divergence == "alpha" else 1.0
    return -torch.expm1((-power * log_ratio).clamp(max=MAX_EXPONENT)) / power
