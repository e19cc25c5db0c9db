"""`span_checksum`: the definition in Python integers, layout invariance, and what it finds."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.op_cases import copy_tensors, random_bits

from megatron_rl.ops.copy_spans import copy_spans
from megatron_rl.ops.span_checksum import span_checksum, tensor_key

MASK = 2**64 - 1
DTYPES = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64, torch.float16]
NAME = "model.layers.0.mlp.up_proj.weight"


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def by_definition(matrix: torch.Tensor, key: int) -> int:
    """The docstring's sum over a whole logical tensor, in Python integers."""
    size = matrix.element_size()
    words = matrix.contiguous().view(torch.uint8 if size == 1 else torch.int16)
    total = 0
    for row, values in enumerate(words.tolist()):
        row_key = mix((key + row * 0x9E3779B97F4A7C15) & MASK) | 1
        for col, word in enumerate(values):
            col_key = mix((0xD1B54A32D192ED03 + col * 0x9E3779B97F4A7C15) & MASK) | 1
            total += row_key * col_key * ((word & 0xFFFF) + 1)
    return (total + 2**63) % 2**64 - 2**63


def whole(matrix: torch.Tensor, key: int, slot: int = 0) -> list[int]:
    rows, cols = matrix.shape
    return [0, slot, key, 0, 0, 0, rows, cols, cols]


def checksum(matrix: torch.Tensor, implementation: str | None = None, name: str = NAME) -> int:
    spans = torch.tensor([whole(matrix, tensor_key(name, matrix.dtype))])
    return int(span_checksum([matrix], spans, implementation=implementation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_the_definition(dtype):
    matrix = random_bits(7 * 13, dtype, torch.Generator().manual_seed(3)).view(7, 13)
    assert checksum(matrix, "reference") == by_definition(matrix, tensor_key(NAME, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 60)), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_sum_over_any_sharding_is_equal(span_checksum_implementation, dtype, shape, seed):
    """Cut at random rows and columns, shuffle the pieces over two tensors with odd offsets and strides, and add up."""
    rows, cols = shape
    matrix = random_bits(rows * cols, dtype, torch.Generator().manual_seed(seed)).view(rows, cols)
    rng = random.Random(seed)
    row_cuts = sorted({0, rows, *(rng.randrange(rows + 1) for _ in range(2))})
    col_cuts = sorted({0, cols, *(rng.randrange(cols + 1) for _ in range(2))})
    locals_ = copy_tensors([rows * (cols + 30) + 50] * 2, dtype, torch.Generator().manual_seed(seed + 1), seed % 3)
    used, jobs, spans = [rng.randrange(3), rng.randrange(9)], [], []
    for r0, r1 in itertools.pairwise(row_cuts):
        for c0, c1 in itertools.pairwise(col_cuts):
            where, stride = rng.randrange(2), c1 - c0 + rng.choice([0, 0, 1, 8])
            jobs.append([0, where, r0 * cols + c0, used[where], r1 - r0, c1 - c0, cols, stride])
            key = tensor_key(NAME, dtype)
            spans.append([where, rng.randrange(2), key, r0, c0, used[where], r1 - r0, c1 - c0, stride])
            used[where] += (r1 - r0) * stride
    copy_spans([matrix], locals_, torch.tensor(jobs), implementation="reference")
    sums = span_checksum(locals_, torch.tensor(spans), 2, implementation=span_checksum_implementation)
    assert int(sums.sum()) == checksum(matrix, "reference")


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
def test_as_dtype_sums_what_copy_spans_would_send(span_checksum_implementation, source, target):
    matrix = random_bits(37 * 53, source, torch.Generator().manual_seed(5)).view(37, 53)
    sent = torch.zeros(37, 53, dtype=target)
    copy_spans([matrix], [sent], torch.tensor([[0, 0, 0, 0, 37, 53, 53, 53]]), implementation="reference")
    spans = torch.tensor([whole(matrix, tensor_key(NAME, target))])
    sums = span_checksum([matrix], spans, as_dtype=target, implementation=span_checksum_implementation)
    assert int(sums) == checksum(sent, "reference")


def test_large_spans_agree_with_the_reference(span_checksum_implementation):
    if span_checksum_implementation == "triton":
        pytest.skip("the Triton interpreter is too slow for millions of elements")
    torch.set_num_threads(3)
    matrix = random_bits(301 * 5003, torch.bfloat16, torch.Generator().manual_seed(6)).view(301, 5003)
    assert checksum(matrix, span_checksum_implementation) == checksum(matrix, "reference")


@given(seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_changed_missing_repeated_and_permuted_elements_are_found(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    matrix = torch.randn(24, 40, generator=generator).bfloat16()
    good = checksum(matrix)
    r, c = rng.randrange(23), rng.randrange(39)

    flipped = matrix.clone()
    flipped.view(torch.int16)[r, c] ^= 1 << rng.randrange(15)
    stale = matrix.clone()
    stale[r] = torch.randn(40, generator=generator).bfloat16()
    swapped = matrix.clone()
    swapped[[r, r + 1]] = matrix[[r + 1, r]]
    columns = matrix.clone()
    columns[:, [c, c + 1]] = matrix[:, [c + 1, c]]
    faults = [flipped, stale, swapped, columns, matrix.T.contiguous().view(24, 40), matrix.roll(1, 0)]
    assert good not in [checksum(fault) for fault in faults]
    assert checksum(matrix, name=NAME.replace(".0.", ".1.")) != good
    assert checksum(matrix.view(torch.float16)) != good


def test_a_missing_zero_and_a_zero_written_twice_are_found():
    matrix = torch.zeros(4, 6, dtype=torch.bfloat16)
    key = tensor_key(NAME, torch.bfloat16)
    part = [0, 0, key, 0, 0, 0, 4, 5, 6]
    column, again = [0, 0, key, 0, 5, 5, 4, 1, 6], [0, 0, key, 3, 5, 23, 1, 1, 6]
    good = checksum(matrix)
    assert int(span_checksum([matrix], torch.tensor([part, column]))) == good
    assert int(span_checksum([matrix], torch.tensor([part]))) != good
    assert int(span_checksum([matrix], torch.tensor([part, column, again]))) != good


def test_a_span_outside_its_tensor_is_named():
    spans = torch.tensor([[0, 0, 1, 0, 0, 0, 2, 2, 2], [0, 0, 1, 0, 0, 3, 2, 2, 2]])
    with pytest.raises(ValueError, match="span 1 leaves its tensor"):
        span_checksum([torch.zeros(6)], spans)
