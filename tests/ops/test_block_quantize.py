"""`block_quantize`: rounding by an oracle that enumerates e4m3; every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.op_cases import FLOATS, assert_bitwise_equal, random_bits

from megatron_rl.ops.block_quantize import block_quantize


def nearest_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest e4m3 value, ties to the even code, by comparing with all 127 magnitudes in float64."""
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    distance = (values.double().abs()[..., None] - table).abs()
    smallest = distance.min(-1, keepdim=True).values
    ties = distance == smallest
    codes = torch.arange(127)
    even_first = torch.where(ties, codes % 2 * 1000 + codes, 10_000).argmin(-1)
    return (even_first + 128 * values.signbit()).to(torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_reference_rounds_each_element_to_the_nearest_code(dtype):
    x = (torch.randn(130, 140, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    x[5, 7] = 400.0
    codes, scales = block_quantize(x, implementation="reference")
    for r in range(2):
        for c in range(2):
            tile = x[128 * r : 128 * (r + 1), 128 * c : 128 * (c + 1)].float()
            scale = tile.abs().max() / 448
            assert scales[r, c] == scale
            part = codes.view(torch.uint8)[128 * r : 128 * (r + 1), 128 * c : 128 * (c + 1)]
            assert torch.equal(part, nearest_e4m3(tile / scale))


@given(
    rows=st.integers(1, 260),
    cols=st.integers(1, 260),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
    wild=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_implementation_agrees_with_the_reference(block_quantize_implementation, rows, cols, dtype, seed, wild):
    if block_quantize_implementation == "triton":
        rows, cols = rows % 140 + 1, cols % 140 + 1
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator).to(dtype)
    if wild:
        x = random_bits(rows * cols, dtype, generator).view(rows, cols)
        if seed % 2:
            x = x.nan_to_num(1.0, 2.0, 3.0)
    expected = block_quantize(x, implementation="reference")
    actual = block_quantize(x, implementation=block_quantize_implementation)
    assert_bitwise_equal(actual[1], expected[1])
    assert_bitwise_equal(actual[0], expected[0])


def test_a_zero_block_has_a_scale_and_zero_codes_and_a_nan_stays_in_its_block(block_quantize_implementation):
    x = torch.zeros(128, 256)
    x[3, 200] = float("nan")
    codes, scales = block_quantize(x, implementation=block_quantize_implementation)
    assert scales[0, 0] == torch.tensor(1e-12) / 448
    assert scales[0, 1].isnan()
    assert not codes[:, :128].float().any()
    assert (codes[:, 128:].view(torch.uint8) == 0x7F).all()


def test_what_is_not_a_contiguous_float_matrix_is_refused():
    for bad in (torch.zeros(4), torch.zeros(4, 4).T[:, :2], torch.zeros(4, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="contiguous matrix"):
            block_quantize(bad)
