"""`accumulate` in Triton: one program for each block of elements, which goes through the parts in order."""

# ruff: noqa: N803  (Triton's constexpr arguments are upper case by convention)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rl.ops.number_types import NUMBER_TYPES
from megatron_rl.ops.tiling import addresses
from megatron_rl.ops.triton_numbers import cast_bits, f32_bits_from, requires

__all__ = ["accumulate", "requires"]

BLOCK, PACK = 2048, 16
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@triton.jit
def sum_parts(
    first, starts, num_parts, out, n, SRC: tl.constexpr, DST: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr
):
    """``first`` and ``out`` are integer views; ``starts``: of each part from ``first``, in packs."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(first + tl.load(starts) * PACK + at, mask=inside, other=0)
    total = f32_bits_from(x, SRC).to(tl.float32, bitcast=True)
    for part in range(1, num_parts):
        x = tl.load(first + tl.load(starts + part) * PACK + at, mask=inside, other=0)
        total += f32_bits_from(x, SRC).to(tl.float32, bitcast=True)
    tl.store(out + at, cast_bits(total.to(tl.int32, bitcast=True), 1, DST), mask=inside)


@torch.no_grad()
def accumulate(parts: Sequence[Tensor], out: Tensor) -> None:
    """See `megatron_rl.ops.accumulate.interface.accumulate`."""
    views = [part.detach().view(-1).view(BITS[part.dtype]) for part in parts]
    found = addresses(views, torch.device("cpu"))
    starts = (found - found[0]) // views[0].element_size()
    pack = PACK if bool((starts % PACK == 0).all()) else 1
    types = NUMBER_TYPES[parts[0].dtype], NUMBER_TYPES[out.dtype]
    sum_parts[(triton.cdiv(out.numel(), BLOCK),)](
        views[0],
        (starts // pack).to(out.device),
        len(views),
        out.view(-1).view(BITS[out.dtype]),
        out.numel(),
        *types,
        pack,
        BLOCK,
        num_warps=8,
    )
