"""CUDA and Triton implementations on a real GPU against the references on the CPU."""

from __future__ import annotations

import pytest
import torch
from ops.gpu_device import DEVICE, only_on_a_gpu
from ops.op_cases import FLOATS, assert_bitwise_equal, random_bits

from megatron_rl.ops.accumulate import accumulate
from megatron_rl.ops.block_quantize import block_quantize
from megatron_rl.ops.copy_spans import copy_spans
from megatron_rl.ops.span_checksum import span_checksum

pytestmark = only_on_a_gpu
IMPLEMENTATIONS = ("reference", "triton", "cuda")
JOBS = [
    [0, 0, 1, 3, 1, 30_001, 0, 0],
    [0, 1, 32, 64, 100, 1024, 1040, 1032],
    [1, 0, 0, 40_000, 300, 33, 35, 34],
    [1, 1, 5, 110_000, 7, 41, 0, 41],
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_copy_spans_on_a_gpu(implementation, source, target):
    generator = torch.Generator().manual_seed(0)
    sources = [random_bits(120_000, source, generator) for _ in range(2)]
    expected = [torch.zeros(120_000, dtype=target) for _ in range(2)]
    actual = [tensor.clone().to(DEVICE) for tensor in expected]
    jobs = torch.tensor(JOBS)
    copy_spans(sources, expected, jobs, implementation="reference")
    copy_spans([tensor.to(DEVICE) for tensor in sources], actual, jobs, implementation=implementation)
    for a, b in zip(actual, expected, strict=True):
        assert_bitwise_equal(a.cpu(), b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(256, 512), (130, 141)])
@pytest.mark.parametrize("wild", [False, True])
def test_block_quantize_on_a_gpu(implementation, dtype, shape, wild):
    generator = torch.Generator().manual_seed(1)
    numel = shape[0] * shape[1]
    x = random_bits(numel, dtype, generator) if wild else torch.randn(numel, generator=generator).to(dtype)
    x = x.view(shape)
    expected = block_quantize(x, implementation="reference")
    actual = block_quantize(x.to(DEVICE), implementation=implementation)
    assert_bitwise_equal(actual[1].cpu(), expected[1])
    assert_bitwise_equal(actual[0].cpu(), expected[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.int64], ids=str)
@pytest.mark.parametrize("as_dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_span_checksum_on_a_gpu(implementation, dtype, as_dtype):
    if as_dtype is not None and dtype not in FLOATS:
        pytest.skip("only floats are cast")
    matrix = random_bits(301 * 1003 + 8, dtype, torch.Generator().manual_seed(2))
    spans = torch.tensor([[0, 1, -9, 5, 7, 0, 300, 1000, 1003], [0, 0, 77, 0, 0, 8, 1003, 301, 301]])
    expected = span_checksum([matrix], spans, 2, as_dtype=as_dtype, implementation="reference")
    actual = span_checksum([matrix.to(DEVICE)], spans, 2, as_dtype=as_dtype, implementation=implementation)
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("out_dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_accumulate_on_a_gpu(implementation, dtype, out_dtype, shift):
    generator = torch.Generator().manual_seed(3)
    parts = [(torch.randn(70_001, generator=generator) * 10**i).to(dtype) for i in range(5)]
    expected = torch.empty(70_001 - shift, dtype=out_dtype)
    accumulate([part[shift:] for part in parts], expected, implementation="reference")
    actual = torch.empty(70_001 - shift, dtype=out_dtype, device=DEVICE)
    accumulate([part.to(DEVICE)[shift:] for part in parts], actual, implementation=implementation)
    assert_bitwise_equal(actual.cpu(), expected)
