"""`copy_spans`: an independent oracle for the reference, and every implementation against the reference."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.op_cases import FLOATS, SPECIAL, assert_bitwise_equal, bits, copy_case, copy_tensors

from megatron_rl.ops.copy_spans import copy_spans

PAIRS = [(a, b) for a in FLOATS for b in FLOATS if a != b]
RAW = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]
QUIET = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}


def exact_cast(value: float, dtype: torch.dtype) -> int:
    """The bits of ``value`` rounded by Python's own exact arithmetic."""
    if math.isnan(value):
        return QUIET[dtype]
    if dtype == torch.float32:
        return struct.unpack("<I", struct.pack("<f", value))[0]
    if dtype == torch.float16:
        try:
            return struct.unpack("<H", struct.pack("<e", value))[0]
        except OverflowError:
            return 0x7C00 | (0x8000 if value < 0 else 0)
    low = struct.unpack("<I", struct.pack("<f", value))[0]
    if low & 0xFFFF == 0 or math.isinf(value):
        return low >> 16
    kept, dropped = low >> 16, low & 0xFFFF
    return kept + (dropped > 0x8000 or (dropped == 0x8000 and kept & 1))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_reference_rounds_to_nearest_even_and_writes_one_nan(source, target):
    patterns = torch.tensor(SPECIAL + [s | 0x80000000 for s in SPECIAL]).to(torch.int32).view(torch.float32)
    values = patterns if source == torch.float32 else patterns.to(source)
    out = torch.zeros(len(values), dtype=target)
    copy_spans([values], [out], torch.tensor([[0, 0, 0, 0, 1, len(values), 0, 0]]), implementation="reference")
    width = (1 << (8 * out.element_size())) - 1
    assert [b & width for b in bits(out).tolist()] == [exact_cast(v, target) for v in values.double().tolist()]


@pytest.mark.parametrize("pair", [*PAIRS, *((raw, raw) for raw in RAW)], ids=str)
@given(case=copy_case(), shift=st.integers(0, 3))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_implementation_agrees_with_the_reference(copy_spans_implementation, pair, case, shift):
    jobs, src_sizes, dst_sizes, seed = case
    generator = torch.Generator().manual_seed(seed)
    sources = copy_tensors(src_sizes, pair[0], generator, shift)
    expected = copy_tensors(dst_sizes, pair[1], generator)
    actual = [tensor.clone() for tensor in expected]
    table = torch.tensor(jobs)
    copy_spans(sources, expected, table, implementation="reference")
    copy_spans(sources, actual, table, implementation=copy_spans_implementation)
    for a, b in zip(actual, expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("pair", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("shape", [(3, 4_000_001, 4_000_003), (9001, 1000, 1003), (1, 12_000_001, 0)])
def test_streaming_copies_of_more_than_the_caches_hold_are_exact(copy_spans_implementation, pair, shape):
    if copy_spans_implementation.startswith("triton"):
        pytest.skip("the Triton interpreter is too slow for millions of elements")
    torch.set_num_threads(3)
    rows, cols, stride = shape
    generator = torch.Generator().manual_seed(0)
    source = copy_tensors([(rows - 1) * stride + cols + 1], pair[0], generator)
    actual = torch.zeros(rows * cols + 5, dtype=pair[1])
    expected = actual.clone()
    table = torch.tensor([[0, 0, 1, 3, rows, cols, stride, cols]])
    copy_spans(source, [actual], table, implementation=copy_spans_implementation)
    copy_spans(source, [expected], table, implementation="reference")
    assert_bitwise_equal(actual, expected)


def test_parameters_that_require_grad_are_written_without_a_graph(copy_spans_implementation):
    source = torch.nn.Parameter(torch.arange(6.0))
    target = torch.nn.Parameter(torch.zeros(6, dtype=torch.bfloat16))
    table = torch.tensor([[0, 0, 0, 0, 1, 6, 0, 0]])
    copy_spans([source], [target], table, implementation=copy_spans_implementation)
    assert target.tolist() == [0, 1, 2, 3, 4, 5]
    assert target.is_leaf
    assert target.grad_fn is None
