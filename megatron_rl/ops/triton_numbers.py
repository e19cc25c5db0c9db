"""Exact number formats for Triton kernels, on bit patterns: the same formulas as csrc/include/numbers.h.

Triton's own casts are not used: on a GPU they write NaN as 0x7FFF, and its interpreter truncates float32 to bfloat16.
"""

# ruff: noqa: N803  (Triton's constexpr arguments are upper case by convention)
from __future__ import annotations

import os

import triton
import triton.language as tl

from megatron_rl.ops.selection import UnavailableError

FLOAT32, BFLOAT16, FLOAT16 = 1, 2, 3  # megatron_rl.ops.number_types


def requires(device_type: str) -> None:
    """The `requires` of every Triton implementation: a CUDA tensor, or Triton's interpreter for a CPU tensor."""
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return
    if device_type != "cuda":
        raise UnavailableError(f"Triton runs on CUDA tensors only, not on {device_type} (tests: TRITON_INTERPRET=1)")


@triton.jit
def bf16_from(u):
    """float32 bits (uint32) -> bfloat16 bits (uint32)."""
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)


@triton.jit
def f16_from(u):
    """float32 bits (uint32) -> float16 bits (uint32)."""
    sign = (u >> 16) & 0x8000
    a = u & 0x7FFFFFFF
    normal = (a + 0xFFF + ((a >> 13) & 1) - (112 << 23)) >> 13
    # Below 2^-14 the unit in the last place of the sum is 2^-24, float16's smallest step: the addition rounds.
    denormal = (a.to(tl.float32, bitcast=True) + 0.5).to(tl.uint32, bitcast=True) - 0x3F000000
    r = tl.where(a < 0x38800000, denormal, normal)
    r = tl.where(a >= 0x477FF000, 0x7C00, r) | sign
    return tl.where(a > 0x7F800000, 0x7E00, r)


@triton.jit
def f32_from_bf16(h):
    """bfloat16 bits (uint32) -> float32 bits (uint32)."""
    u = h << 16
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, u)


@triton.jit
def f32_from_f16(h):
    """float16 bits (uint32) -> float32 bits (uint32)."""
    a = h & 0x7FFF
    denormal = (a.to(tl.int32).to(tl.float32) * 5.9604644775390625e-8).to(tl.uint32, bitcast=True)  # a * 2^-24
    r = tl.where(a < 0x400, denormal, (a << 13) + (112 << 23))
    r = tl.where(a == 0x7C00, 0x7F800000, r) | ((h & 0x8000) << 16)
    return tl.where(a > 0x7C00, 0x7FC00000, r)


@triton.jit
def f32_bits_from(x, TYPE: tl.constexpr):
    """Bits of a number of ``TYPE``, as loaded from an integer view -> float32 bits (uint32)."""
    if TYPE == 2:
        return f32_from_bf16(x.to(tl.uint16, bitcast=True).to(tl.uint32))
    elif TYPE == 3:
        return f32_from_f16(x.to(tl.uint16, bitcast=True).to(tl.uint32))
    else:
        return x.to(tl.uint32, bitcast=True)


@triton.jit
def cast_bits(x, SRC: tl.constexpr, DST: tl.constexpr):
    """Bits of a number of type ``SRC`` -> bits of type ``DST`` as a signed integer of its size; both 0: unchanged."""
    if SRC == 0:
        return x
    else:
        u = f32_bits_from(x, SRC)
        if DST == 1:
            return u.to(tl.int32, bitcast=True)
        elif DST == 2:
            return bf16_from(u).to(tl.uint16).to(tl.int16, bitcast=True)
        else:
            return f16_from(u).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def e4m3_from(u):
    """float32 bits (uint32) of at most 448 in magnitude, or NaN -> float8 e4m3fn bits (uint8)."""
    sign = (u >> 24) & 0x80
    magnitude = u & 0x7FFFFFFF
    a = tl.where(magnitude > 0x43E00000, 0x43E00000, magnitude)
    normal = (a + 0x7FFFF + ((a >> 20) & 1) - (120 << 23)) >> 20
    denormal = (a.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    r = tl.where(a < (121 << 23), denormal, normal) | sign
    return tl.where(magnitude > 0x7F800000, 0x7F, r).to(tl.uint8)
