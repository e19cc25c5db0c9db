"""Fixtures that run a test once for every implementation that can run here, and every vector level of the C++ one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_rl.ops.selection import UnavailableError, implementations, load

LEVELS = {"plain": 0, "avx2": 1, "avx512": 2}


def cases(op: str) -> list[str]:
    """Names of the test cases of one operation: "cpu-avx2" stands for implementation cpu at that vector level."""
    found = []
    for name in implementations(op):
        if name == "cpu":
            found += [f"cpu-{level}" for level in LEVELS]
        elif name == "triton":  # CUDA has its own files: test_cuda_bodies.py and test_gpu_implementations.py
            found.append(name)
    return found


@pytest.fixture(autouse=True)
def one_thread_by_default() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def prepared(op: str, case: str) -> Iterator[str]:
    """Skip unless ``case`` can run on CPU tensors; hold its vector level; yield the implementation's name."""
    name, _, level = case.partition("-")
    try:
        load(op, name, "cpu")
    except UnavailableError as reason:
        pytest.skip(f"{op} {name}: {reason}")
    if not level:
        yield name
        return
    limit = torch.ops.megatron_rl_cpu.limit_vector_level
    if limit(LEVELS[level]) != LEVELS[level]:
        limit(max(LEVELS.values()))
        pytest.skip(f"this processor has no {level}")
    yield name
    limit(max(LEVELS.values()))


@pytest.fixture(params=cases("copy_spans"), scope="module")
def copy_spans_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from prepared("copy_spans", request.param)


@pytest.fixture(params=cases("block_quantize"), scope="module")
def block_quantize_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from prepared("block_quantize", request.param)


@pytest.fixture(params=cases("span_checksum"), scope="module")
def span_checksum_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from prepared("span_checksum", request.param)
