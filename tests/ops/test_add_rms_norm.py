"""`add_rms_norm`: against the formula in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops.conftest import cases, prepared

from megatron_rl.ops.add_rms_norm import add_rms_norm


@pytest.fixture(params=["reference", *cases("add_rms_norm")], scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from prepared("add_rms_norm", request.param)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 7), (5, 64), (17, 100), (2, 4099)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_sum_and_norm_follow_the_formula(rows: int, cols: int, scale: float, implementation: str) -> None:
    torch.manual_seed(cols)
    hidden, delta, weight = torch.randn(rows, cols) * scale, torch.randn(rows, cols) * scale, torch.randn(cols)
    total = hidden.double() + delta.double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    normed = add_rms_norm(hidden, delta, weight, 1e-5, implementation=implementation)
    torch.testing.assert_close(normed.double(), expected, atol=1e-6, rtol=2e-6)
    torch.testing.assert_close(hidden.double(), total, atol=0, rtol=1e-6)


def test_bfloat16_runs_on_the_reference_and_bad_shapes_are_refused() -> None:
    hidden, weight = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    assert torch.equal(add_rms_norm(hidden, hidden.clone(), weight, 0.0), torch.ones_like(hidden))
    with pytest.raises(ValueError, match="expected"):
        add_rms_norm(hidden, hidden[:1], weight, 1e-5)
    with pytest.raises(ValueError, match="dtype"):
        add_rms_norm(hidden, hidden.clone(), weight.float(), 1e-5)
