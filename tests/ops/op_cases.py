"""Random inputs for the operations, and comparison bit for bit."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Zeros, infinities, NaNs of several payloads, denormals, and ties of each cast, as float32 bits.
SPECIAL = [
    *(0x00000000, 0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x00000001, 0x007FFFFF, 0x00400000, 0x38800000),
    *(0x387FFFFF, 0x33000000, 0x33000001, 0x32FFFFFF, 0x477FEFFF, 0x477FF000, 0x7F7FFFFF, 0x3F808000, 0x3F818000),
    *(0x3F801000, 0x3F803000, 0x33800000, 0x33C00000, 0x387FE000, 0x387FF000, 0x7F7F8000, 0x3F7FFFFF, 0x3F800001),
]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Raise with the first differing coordinate and both values and bit patterns."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    differing = (bits(actual) != bits(expected)).nonzero()
    if len(differing):
        at = tuple(differing[0].tolist())
        raise AssertionError(
            f"{len(differing)} of {actual.numel()} elements differ, first at {at}: {actual[at].float()} "
            f"({bits(actual)[at].item():#x}) instead of {expected[at].float()} ({bits(expected)[at].item():#x})"
        )


def random_bits(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bit pattern: most values, all NaNs and denormals included; half of float32 values near one."""
    raw = torch.randint(-(2**31), 2**31, (numel,), generator=generator).to(torch.int32)
    if dtype == torch.float32:
        special = torch.tensor(SPECIAL, dtype=torch.int32)
        pick = torch.randint(0, len(SPECIAL), (numel,), generator=generator)
        sign = raw & -(2**31)
        kind = torch.randint(0, 3, (numel,), generator=generator)
        near_one = torch.randn(numel, generator=generator).view(torch.int32)
        return torch.where(kind == 0, raw, torch.where(kind == 1, special[pick] | sign, near_one)).view(dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    return raw.repeat_interleave(max(1, size // 4)).view(torch.uint8)[: numel * size].view(dtype)


@st.composite
def copy_case(draw: st.DrawFn, largest: int = 70) -> tuple[list[tuple[int, ...]], list[int], list[int], int]:
    """Jobs whose destinations do not overlap, the sizes of sources and destinations, and a seed for the data."""
    num_sources, num_destinations = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    src_sizes, dst_sizes = [0] * num_sources, [draw(st.integers(0, 3)) for _ in range(num_destinations)]
    jobs = []
    for _ in range(draw(st.integers(1, 6))):
        rows, cols = draw(st.integers(0, 9)), draw(st.integers(0, largest))
        src, dst = draw(st.integers(0, num_sources - 1)), draw(st.integers(0, num_destinations - 1))
        src_stride = draw(st.sampled_from([cols, cols + 1, cols + 8, 2 * cols + 16, 0]))
        dst_stride = cols + draw(st.sampled_from([0, 0, 1, 8, 16]))
        src_offset = draw(st.sampled_from([0, 1, 7, 8, 16]))
        jobs.append((src, dst, src_offset, dst_sizes[dst], rows, cols, src_stride, dst_stride))
        src_sizes[src] = max(src_sizes[src], src_offset + max(0, rows - 1) * src_stride + cols)
        dst_sizes[dst] += max(0, rows - 1) * dst_stride + (cols if rows else 0) + draw(st.sampled_from([0, 0, 1, 8]))
    return jobs, src_sizes, dst_sizes, draw(st.integers(0, 2**31))


def copy_tensors(sizes: list[int], dtype: torch.dtype, generator: torch.Generator, shift: int = 0) -> list[Tensor]:
    """Random tensors whose memory begins ``shift`` elements after an aligned address."""
    return [random_bits(size + shift, dtype, generator)[shift:] for size in sizes]
