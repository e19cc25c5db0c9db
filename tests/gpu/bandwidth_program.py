"""Bandwidth of the operations on a GPU beside what a plain device copy reaches; one JSON object on the last line.

Numbers are gigabytes read and written a second, of the median of 20 calls. ``kernel`` counts the kernels' own time as
CUDA's profiler reports it, ``call`` the time from call to end on an idle device, with the tables' way to the device.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, supported_activities

from megatron_rl.ops.block_quantize import block_quantize
from megatron_rl.ops.copy_spans import copy_spans
from megatron_rl.ops.span_checksum import span_checksum

ELEMENTS = 256 * 2**20
ROWS, COLS = 1024, 2048  # of one job: half of the rows of 4096 elements, as a column-parallel slice is
IMPLEMENTATIONS = ("triton", "cuda")
CALLS = 20


def measure(call: Callable[[], object], num_bytes: int) -> dict[str, float]:
    for _ in range(3):
        call()
    times = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    found = {"call": round(num_bytes / statistics.median(times) / 1e9, 1)}
    if ProfilerActivity.CUDA not in supported_activities():
        return found
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    # Copies of small tables appear as "Memcpy HtoD", not as kernels of their own.
    kernels = [event for event in profiler.key_averages() if not event.key.startswith("Memcpy HtoD")]
    seconds = sum(event.self_device_time_total for event in kernels) / 1e6 / CALLS
    return found | ({"kernel": round(num_bytes / seconds / 1e9, 1)} if seconds else {})


def strided_jobs(num_jobs: int) -> Tensor:
    """[num_jobs, 8]: left halves of rows of 2 * COLS elements into dense rows."""
    job = torch.arange(num_jobs)
    zeros, full = torch.zeros_like(job), torch.full_like(job, ROWS)
    source, target = job * ROWS * 2 * COLS, job * ROWS * COLS
    return torch.stack([zeros, zeros, source, target, full, full * 0 + COLS, full * 0 + 2 * COLS, full * 0 + COLS], 1)


def copies(source_dtype: torch.dtype, target_dtype: torch.dtype) -> dict[str, dict[str, float]]:
    source = torch.randn(ELEMENTS, device="cuda").to(source_dtype)
    target = torch.empty(ELEMENTS // 2, device="cuda", dtype=target_dtype)
    jobs = strided_jobs(ELEMENTS // (2 * ROWS * COLS))
    num_bytes = target.numel() * (source.element_size() + target.element_size())
    halves, dense = source.view(-1, 2 * COLS)[:, :COLS], target.view(-1, COLS)
    found = {"device copy": measure(lambda: target.copy_(source[: len(target)]), num_bytes)}
    found["device copy, strided"] = measure(lambda: dense.copy_(halves), num_bytes)
    for name in IMPLEMENTATIONS:
        target.zero_()

        def call(name: str = name) -> None:
            copy_spans([source], [target], jobs, checked=False, implementation=name)

        found[name] = measure(call, num_bytes)
        assert torch.equal(dense, halves.to(target_dtype)), f"{name} copied wrongly"
    return found


def checksums() -> dict[str, dict[str, float]]:
    source = torch.randn(ELEMENTS // 4, device="cuda")
    spans = torch.tensor([[0, 0, 1, 0, 0, 0, len(source) // COLS, COLS, COLS]])
    size = len(source) * source.element_size()
    return {
        name: measure(lambda name=name: span_checksum([source], spans, 1, implementation=name), size)  # type: ignore[misc]
        for name in IMPLEMENTATIONS
    }


def quantizations() -> dict[str, dict[str, float]]:
    source = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    size = source.numel() * 3
    return {
        name: measure(lambda name=name: block_quantize(source, implementation=name), size)  # type: ignore[misc]
        for name in IMPLEMENTATIONS
    }


def main() -> None:
    found = {
        "copy_spans float32 to bfloat16": copies(torch.float32, torch.bfloat16),
        "copy_spans bfloat16": copies(torch.bfloat16, torch.bfloat16),
        "span_checksum float32": checksums(),
        "block_quantize bfloat16": quantizations(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
