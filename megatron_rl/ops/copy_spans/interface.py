"""The contract of `copy_spans` and its edge checks.

A job says: take ``rows`` x ``cols`` elements that begin at ``src_offset`` in source ``src_index``, where consecutive
rows are ``src_stride`` elements apart, and write them at ``dst_offset`` of destination ``dst_index`` with row distance
``dst_stride``. Jobs are one int64 table, so that a plan is built once and replayed at each weight push.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.ops.selection import choose

JOB_COLUMNS = ("src_index", "dst_index", "src_offset", "dst_offset", "rows", "cols", "src_stride", "dst_stride")
CASTS = (torch.float32, torch.bfloat16, torch.float16)


def copy_spans(
    sources: list[Tensor],
    destinations: list[Tensor],
    jobs: Tensor,
    *,
    checked: bool = True,
    implementation: str | None = None,
) -> None:
    """Run all ``jobs`` from ``sources`` to ``destinations``, in no particular order.

    A copy between equal dtypes preserves every bit. A cast among float32, bfloat16 and float16 rounds to nearest,
    ties to even, keeps denormals and infinities, and writes any NaN as the quiet NaN of the destination
    (0x7FC00000, 0x7FC0, 0x7E00), so that all implementations agree bit for bit. No gradient is recorded.

    Args:
        sources: contiguous tensors of one dtype and device, any shape, addressed as flat memory.
        destinations: contiguous tensors of one dtype, on the device of the sources. Distinct jobs must not write
            the same element, nor write what another job reads: the order of jobs is not defined.
        jobs: [n, 8] int64 on the CPU, columns `JOB_COLUMNS`, offsets and strides in elements.
        checked: False skips `check_jobs` for a table that was checked when it was built.
        implementation: forces one ("reference", "cpu", "triton", "cuda"); None takes the best available.

    Raises:
        ValueError: a malformed table, an unsupported pair of dtypes, or a job outside its tensors.
        UnavailableError: the forced implementation cannot run here.
    """
    if jobs.shape[0] == 0 or not sources or not destinations:
        if jobs.shape[0] != 0:
            raise ValueError(f"{jobs.shape[0]} jobs, {len(sources)} sources, {len(destinations)} destinations")
        return
    if checked:
        check_jobs(sources, destinations, jobs)
    choose("copy_spans", destinations[0].device.type, implementation)(sources, destinations, jobs)


def check_jobs(sources: list[Tensor], destinations: list[Tensor], jobs: Tensor) -> None:
    """Raise ValueError, naming the first bad job, unless every job stays inside its tensors.

    That no two jobs write the same element is the planner's proof, not checked here.
    """
    if jobs.dtype != torch.int64 or jobs.dim() != 2 or jobs.shape[1] != len(JOB_COLUMNS) or not jobs.is_contiguous():
        raise ValueError(
            f"jobs must be a contiguous int64 [n, {len(JOB_COLUMNS)}] table, got {jobs.dtype} {list(jobs.shape)}"
        )
    _check_tensors("source", sources)
    _check_tensors("destination", destinations)
    src, dst = sources[0], destinations[0]
    if src.device != dst.device:
        raise ValueError(f"sources lie on {src.device}, destinations on {dst.device}: move one side first")
    if src.dtype != dst.dtype and not (src.dtype in CASTS and dst.dtype in CASTS):
        raise ValueError(f"no cast from {src.dtype} to {dst.dtype}: casts exist among {', '.join(map(str, CASTS))}")
    table = jobs
    rows, cols = table[:, 4], table[:, 5]
    bad = (rows < 0) | (cols < 0)
    bad |= _outside(sources, table[:, 0], table[:, 2], rows, cols, table[:, 6])
    bad |= _outside(destinations, table[:, 1], table[:, 3], rows, cols, table[:, 7])
    bad |= (rows > 1) & (table[:, 7] < cols)  # rows of one job would overwrite one another
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        job = dict(zip(JOB_COLUMNS, table[first].tolist(), strict=True))
        raise ValueError(
            f"job {first} leaves its tensors or overlaps itself: {job}; {len(sources)} sources, "
            f"{len(destinations)} destinations, {int(bad.sum())} of {len(table)} jobs are bad"
        )


def _check_tensors(side: str, tensors: list[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device or not tensor.is_contiguous():
            raise ValueError(
                f"{side} {index} is {tensor.dtype} on {tensor.device}, contiguous={tensor.is_contiguous()}; all must "
                f"be contiguous, {tensors[0].dtype} on {tensors[0].device}"
            )


def _outside(
    tensors: list[Tensor], index: Tensor, offset: Tensor, rows: Tensor, cols: Tensor, stride: Tensor
) -> Tensor:
    """[n] bool: the job's rectangle leaves the flat memory of the tensor it names (empty jobs never do)."""
    sizes = torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64)
    unknown = (index < 0) | (index >= len(tensors))
    last = offset + (rows - 1) * stride + cols
    beyond = (offset < 0) | (stride < 0) | (last > sizes[index.clamp(0, len(tensors) - 1)])
    return unknown | (beyond & (rows > 0) & (cols > 0))
