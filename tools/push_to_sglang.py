"""Pushes into a real SGLang server, for `bench_reshard.py`: seconds and counted extra memory at several limits.

The trainer's four ranks hold the model at TP2 x PP2; ranks 0 and 1 feed one server of two tensor-parallel ranks, which
this starts on the CPU (or attaches to). `wall_s` is that of the slowest rank, the median of several pushes after a
first one; the limits take turns. ``peak_extra_bytes`` is counted as buffers are allocated, on the worst rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.models import Architecture, megatron_layout, rollout_layout
from megatron_rl.parallel import ParallelContext
from megatron_rl.reshard import Layout
from megatron_rl.rollout import SGLangEngine
from megatron_rl.weights.sync import SyncReport, WeightSync

LIMITS = {"4MB": 4 << 20, "16MB": 16 << 20, "64MB": 64 << 20}
TP = 2
WAIT_SECONDS = 900.0


class NoEngine:
    """The handle of a rank that feeds no server."""

    streams, bucket_copies = True, 2

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def targets(self) -> Mapping[str, Tensor]:
        return {}

    def begin_update(self) -> None:
        """Nothing to do, as in all below: it is never called here."""

    def write_shards(self, shards: Mapping[str, Tensor], fault: str = "") -> None: ...

    def finish_update(self) -> str:
        return ""

    def commit_update(self, version: int) -> None: ...

    def abort_update(self, intact: bool) -> None: ...


def measure(
    architecture: Architecture,
    context: ParallelContext,
    vocab: int,
    tensors: Mapping[str, Tensor],
    python: str,
    rounds: int,
) -> dict:
    """The figures of each limit.

    Args:
        context, tensors: of the model that is pushed; ``vocab``: its padded vocabulary.
        python: of SGLang's environment, or the url of a running server.
    """
    rank, target = dist.get_rank(), rollout_layout(architecture, TP, [range(TP)])
    group = dist.new_group(list(range(TP)))
    source = megatron_layout(architecture, context.grid, vocab)
    where: dict = {"urls": [python]} if python.startswith("http") else {}
    where = where or {"server": {"python": python, "context_length": 64, "max_total_tokens": 256}}
    engine = None
    if rank < TP:
        engine = SGLangEngine(architecture, target, rank, torch.bfloat16, tp_group=group, max_running=2, **where)
    try:
        handle = engine or NoEngine(target)
        syncs = {
            name: WeightSync(source, handle, rank, wire_dtype=torch.bfloat16, max_staging_bytes=limit)
            for name, limit in LIMITS.items()
        }
        return _figures(lambda name, version: syncs[name].push(tensors, version), rounds)
    finally:
        if engine is not None:
            engine.close()


def _figures(push: Callable[[str, int], SyncReport], rounds: int) -> dict:
    seconds: dict[str, list[float]] = {name: [] for name in LIMITS}
    reports: dict[str, SyncReport] = {}
    for round_ in range(rounds + 1):
        for number, name in enumerate(LIMITS):
            dist.barrier()
            start = time.perf_counter()
            reports[name] = push(name, round_ * len(LIMITS) + number + 1)
            slowest = torch.tensor([time.perf_counter() - start])
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds[name] += [float(slowest)] if round_ else []
    figures = {}
    for name, report in reports.items():
        peak = torch.tensor([report.peak_bytes])
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        figures[name] = {
            "wall_s": round(statistics.median(seconds[name]), 4),
            "peak_extra_bytes": int(peak),
            "buckets": report.num_buckets,
            "buckets_over_the_limit": report.num_oversized,
        }
    return figures
