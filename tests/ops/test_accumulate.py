"""Every implementation of `accumulate` against sums one after the other, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops.conftest import cases, prepared

from megatron_rl.ops.accumulate import accumulate


@pytest.fixture(params=["reference", *cases("accumulate")], scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from prepared("accumulate", request.param)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("elements", [0, 1, 4095, 9001])
def test_the_sum_is_taken_in_order_and_rounded_once(implementation, out_dtype, dtype, num_parts, elements):
    generator = torch.Generator().manual_seed(num_parts + elements)
    scale = 10.0 ** torch.arange(num_parts)  # the order of unequal numbers shows in the last bits
    parts = [(torch.randn(elements, generator=generator) * scale[i]).to(dtype) for i in range(num_parts)]
    expected = parts[0].float()
    for part in parts[1:]:
        expected = expected + part.float()
    out = torch.empty(elements, dtype=out_dtype)
    assert accumulate(parts, out, implementation=implementation) is out
    assert torch.equal(out, expected.to(out_dtype))


def test_out_may_be_one_of_the_parts(implementation):
    parts = [torch.full((5000,), value) for value in (1.0, 2.0, 4.0)]
    accumulate(parts, parts[1], implementation=implementation)
    assert torch.equal(parts[1], torch.full((5000,), 7.0))


def test_what_does_not_fit_is_refused():
    ones = torch.ones(4)
    with pytest.raises(ValueError, match="at least one part"):
        accumulate([], ones)
    with pytest.raises(ValueError, match=r"float64"):
        accumulate([ones.double()], ones)
    with pytest.raises(ValueError, match=r"\[4, 3, 4\]"):
        accumulate([ones, ones[:3]], ones.clone())
    with pytest.raises(ValueError, match="contiguous"):
        accumulate([torch.ones(8)[::2]], ones)
