"""Full matrices for comparisons with padded implementations: the same numbers as `[batch, time]` and as rows."""

from __future__ import annotations

import numpy as np
import torch
from algorithms.ragged import Rows, gradient_of, make_inputs

BATCH, TIME = 6, 9


def make_matrices(seed: int = 0, spread: float = 0.4) -> dict[str, torch.Tensor]:
    """Float64 fields ``[6, 9]``; every row has some response tokens, with holes as in multi-turn responses."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> torch.Tensor:
        return torch.randn(BATCH, TIME, generator=generator, dtype=torch.float64) * scale

    mask = (torch.rand(BATCH, TIME, generator=generator) < 0.7).double()
    mask[:, 2] = 1.0
    old = -normal(1.0).abs() - 0.1
    return {
        "mask": mask,
        "old_logprobs": old,
        "logprobs": old + normal(spread),
        "ref_logprobs": old + normal(0.3),
        "advantages": normal(1.0)[:, :1].expand(BATCH, TIME).contiguous(),
        "entropy": normal(1.0).abs(),
        "values": normal(1.0),
        "current_values": normal(1.0),
        "returns": normal(1.0),
        "rewards": normal(1.0),
    }


def as_rows(matrices: dict[str, torch.Tensor], *names: str) -> Rows:
    return [{name: matrices[name][i].tolist() for name in ("mask", "logprobs", *names)} for i in range(BATCH)]


def ours(loss, matrices: dict[str, torch.Tensor], *names: str, sequences=None, by: str = "logprobs"):
    """Value and ``[6, 9]`` gradient of one of our losses."""
    inputs = make_inputs(as_rows(matrices, *names), sequences=sequences)
    output = loss(inputs)
    tensor = inputs.values if by == "current_values" else inputs.logprobs
    return output.loss.item(), gradient_of(output, tensor).reshape(BATCH, TIME)


def assert_same(found: tuple, value: torch.Tensor, gradient: torch.Tensor, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(found[0], value.item(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found[1], gradient.numpy(), rtol=tolerance, atol=tolerance)
