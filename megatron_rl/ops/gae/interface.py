"""The contract of `gae` and its edge checks.

Generalised Advantage Estimation (arXiv 1506.02438, eq. 16) over sequences packed end to end. Only tokens whose
mask is set are steps of the decision process: the step after a token is the *next masked token of the same sequence*,
however many observation tokens (tool output, user turns) lie between, and nothing is discounted through these.

    delta_t = r_t + gamma * v_next - v_t        (v_next = 0 after a sequence's last step)
    A_t     = delta_t + gamma * lambda * A_next
    R_t     = A_t + v_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.selection import choose


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each ``[num_tokens]`` in the dtype of ``values``; 0 outside the mask. No gradient.

    Args:
        rewards: ``[num_tokens]`` fp32 or fp64, the reward for choosing the token; ignored outside the mask.
        values: ``[num_tokens]``, same dtype: value of the state before the token; finite on the mask, ignored outside.
        mask: ``[num_tokens]`` bool, the steps.
        cu_seqlens: ``[num_sequences + 1]`` int64, sequence i at ``cu_seqlens[i]:cu_seqlens[i + 1]``.
        gamma: discount of a step, in [0, 1].
        lam: decay of the mix of estimators, in [0, 1]; 1 with ``values`` of 0 gives discounted rewards to go.
        implementation: forces one ("reference", "cpu", "triton", "cuda"); None takes the best available.

    Raises:
        ValueError: shapes or dtypes do not fit, or a factor outside [0, 1].
        UnavailableError: the forced implementation cannot run here.
    """
    shapes = [tuple(tensor.shape) for tensor in (rewards, values, mask)]
    if values.dim() != 1 or len(set(shapes)) != 1:
        raise ValueError(f"rewards, values and mask must be [num_tokens] alike, got {shapes}")
    if rewards.dtype != values.dtype or values.dtype not in (torch.float32, torch.float64) or mask.dtype != torch.bool:
        raise ValueError(
            f"expected rewards and values in one of float32, float64 and a bool mask, got {rewards.dtype}, "
            f"{values.dtype}, {mask.dtype}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or int(cu_seqlens[-1]) != values.numel():
        raise ValueError(
            f"cu_seqlens must run from 0 to {values.numel()} tokens, got {cu_seqlens.tolist()[-3:]} at its end"
        )
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"gamma={gamma} and lam={lam} must lie in [0, 1]")
    return choose("gae", values.device.type, implementation)(rewards, values, mask, cu_seqlens, gamma, lam)
