"""The definition of `span_checksum`, and its edge checks.

**Definition**, all arithmetic modulo 2^64. The bits of an element, in the checked dtype, are its *words*: itself if it
has one byte, else its 16-bit halves from the least significant up. Word ``j`` of the element at logical ``(row, col)``
of tensor ``T`` stands at word column ``w = col * words_per_element + j``. Then

    checksum = sum over words of  row_key(T, row) * col_key(w) * (word + 1)
    row_key(T, row) = mix(tensor_key(T) + row * STEP) | 1        col_key(w) = mix(COLUMN_SEED + w * STEP) | 1

with SplitMix64's finaliser as ``mix`` (Steele, Lea, Flood, OOPSLA 2014). It is a plain sum over elements, keyed by name
and logical position only: the shards of *any* layout that covers each element once add up to the same value, and
checksums of ranks combine with an int64 all-reduce (which wraps, as wanted).

**What it finds.** Keys are odd, hence invertible: one changed element (stale, flipped, zeroed) changes one product by
less than 2^16 times an odd number, never 0: found with certainty. The same holds for one missing or repeated word,
as ``word + 1`` is between 1 and 2^16. For any other fixed set of errors, let D be the matrix of their differences,
``|D| <= 2^16``; it stays hidden only if ``sum_r A_r sum_c D_rc B_c = 0``. With keys as good as independent uniform odd
numbers, an inner sum is divisible by 2^j with probability at most 2^(17-j), and the outer one then vanishes with
probability at most 2^(j-63): over all j below 2^-40. It is no defence against an adversary, who knows the keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rl.ops.selection import choose

SPAN_COLUMNS = ("tensor_index", "slot", "key", "logical_row", "logical_col", "offset", "rows", "cols", "stride")
CAST_TO = (torch.bfloat16, torch.float16)
CAST_FROM = (torch.float32, torch.bfloat16, torch.float16)


def tensor_key(name: str, dtype: torch.dtype) -> int:
    """The int64 key of a logical tensor: a hash of its name and of the dtype whose bits are summed.

    Two sides that would agree on all bits but not on the dtype therefore disagree on the checksum.
    """
    digest = hashlib.blake2b(f"{name}\0{str(dtype).removeprefix('torch.')}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def span_checksum(
    tensors: list[Tensor],
    spans: Tensor,
    num_slots: int = 1,
    *,
    as_dtype: torch.dtype | None = None,
    checked: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """Checksums of logical rectangles that lie in local ``tensors``; see the module docstring for the definition.

    Args:
        tensors: contiguous, of one dtype and device, addressed as flat memory.
        spans: [n, 9] int64 on the CPU, columns `SPAN_COLUMNS`, one logical rectangle each: the local tensor it lies
            in, the slot of the result it is added to, `tensor_key` of the logical tensor, the logical row and column
            of its upper left element, and, in elements of local memory, its offset, size and row stride.
        num_slots: length of the result. One slot per logical tensor names the faulty one; one slot is one comparison.
        as_dtype: bfloat16 or float16: cast each element (as `copy_spans` does) before taking its bits, so that
            float32 masters are compared with what they were sent as. None: the bits as they are.
        checked: False skips the bounds check for a table that was checked when it was built.
        implementation: forces one; None takes the best available.

    Returns:
        [num_slots] int64 on the device of ``tensors``; an empty slot is 0.

    Raises:
        ValueError: a malformed table, an unsupported cast, or a span outside its tensor.
        UnavailableError: the forced implementation cannot run here.
    """
    if not tensors or spans.shape[0] == 0:
        return torch.zeros(num_slots, dtype=torch.int64, device=tensors[0].device if tensors else None)
    if checked:
        _check(tensors, spans, num_slots)
    dtype = tensors[0].dtype
    run: Callable[..., Tensor] = choose("span_checksum", tensors[0].device.type, implementation)
    if as_dtype is not None and as_dtype != dtype:
        if dtype not in CAST_FROM or as_dtype not in CAST_TO:
            raise ValueError(f"no checksum of {dtype} as {as_dtype}: from {CAST_FROM} to {CAST_TO}")
        return run(tensors, spans, num_slots, as_dtype)
    words, spans = _in_words(tensors, spans)
    return run(words, spans, num_slots, None)


def _in_words(tensors: list[Tensor], spans: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same memory and rectangles in units of words: uint8 for one-byte elements, else int16."""
    size = tensors[0].element_size()
    word = torch.uint8 if size == 1 else torch.int16
    per_element = max(1, size // 2)
    if per_element > 1:
        columns = [SPAN_COLUMNS.index(name) for name in ("logical_col", "offset", "cols", "stride")]
        spans = spans.clone()
        spans[:, columns] *= per_element
    return [tensor.detach().reshape(-1).view(word) for tensor in tensors], spans


def _check(tensors: list[Tensor], spans: Tensor, num_slots: int) -> None:
    if spans.dtype != torch.int64 or spans.dim() != 2 or spans.shape[1] != len(SPAN_COLUMNS):
        raise ValueError(
            f"spans must be an int64 [n, {len(SPAN_COLUMNS)}] table, got {spans.dtype} {list(spans.shape)}"
        )
    if not spans.is_contiguous() or spans.device.type != "cpu":
        raise ValueError(f"spans must be contiguous and on the CPU, not on {spans.device}")
    for index, tensor in enumerate(tensors):
        if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device or not tensor.is_contiguous():
            raise ValueError(
                f"tensor {index} is {tensor.dtype} on {tensor.device}, contiguous={tensor.is_contiguous()}; all must "
                f"be contiguous, {tensors[0].dtype} on {tensors[0].device}"
            )
    source, slot, offset, rows, cols, stride = (spans[:, column] for column in (0, 1, 5, 6, 7, 8))
    sizes = torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64)
    bad = (source < 0) | (source >= len(tensors)) | (slot < 0) | (slot >= num_slots) | (rows < 0) | (cols < 0)
    beyond = offset + (rows - 1) * stride + cols > sizes[source.clamp(0, len(tensors) - 1)]
    bad |= ((offset < 0) | (stride < 0) | beyond) & (rows > 0) & (cols > 0)
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        span = dict(zip(SPAN_COLUMNS, spans[first].tolist(), strict=True))
        raise ValueError(f"span {first} leaves its tensor or the {num_slots} slots: {span}")
