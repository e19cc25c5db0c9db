"""`ErrorFeedback`: what rounding to the wire's dtype left out is added to the next reduction of the same buffer.

Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019, arXiv:1901.09847. A residual is replaced only once its
reduction was delivered, so one that is sent again after a failure rounds the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ErrorFeedback:
    """Residuals by key; off, it only rounds."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._residuals: dict[object, Tensor] = {}
        self._pending: dict[object, Tensor] = {}

    def rounded(self, key: object, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """``exact``, flat fp32, in ``dtype``; with what an earlier call of this key left out."""
        if dtype == exact.dtype:
            return exact
        if not self.enabled:
            return exact.to(dtype)
        before = self._residuals.get(key)
        wanted = exact if before is None or before.shape != exact.shape else exact + before
        sent = wanted.to(dtype)
        self._pending[key] = wanted - sent.float()
        return sent

    def commit(self) -> None:
        """What was rounded has been delivered."""
        self._residuals |= self._pending
        self._pending.clear()
