"""Pushes into a real SGLang server: seconds, and extra memory of the trainer's ranks, at several limits on it.

75M parameters of a Llama in bf16. Four gloo ranks hold them at TP2 x PP2; ranks 0 and 1 feed one server of two
tensor-parallel ranks on this machine. The limits take turns. ``wall_s``: of the slowest rank, median over rounds;
``cpu_s``: of all ranks together, without the server's, median. ``peak_extra_bytes``: counted as buffers are allocated,
on the worst rank. ``resident_growth_bytes``: how far the resident set of the worst rank grew during a push, as the
kernel counts it, median of rounds of their own; what a push does not allocate by itself, such as messages to the server
and the interpreter's own objects, is part of it.

`bench_reshard.py` calls this. By itself it can compare with another checkout of this package, of today's interfaces or
of the time when a whole copy of the weights was kept (``kept_bytes``): each has four ranks of its own, all push into
the same server, and the packages take turns in each round.

    python tools/push_to_sglang.py --sglang PYTHON|URL [--package OTHER_CHECKOUT] [--rounds 9]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from resident_memory import growth
from torch import Tensor

from megatron_rl.devices import current_platform
from megatron_rl.models import Architecture, logical_tensors, megatron_layout, rollout_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard import Layout
from megatron_rl.rollout import SGLangEngine
from megatron_rl.weights.sync import WeightSync

LIMITS = {"4MB": 4 << 20, "16MB": 16 << 20, "64MB": 64 << 20}
VOCAB = 4096  # no shard is larger than what the lowest limit leaves for one: servers take whole shards
ARCHITECTURE = Architecture("llama", 24, 512, 1536, 8, 4, 64, VOCAB, tied=False)
SIZES, WORLD, TP = {"tp": 2, "pp": 2}, 4, 2
MEMORY_ROUNDS = 3
WAIT = timedelta(minutes=20)


class NoEngine:
    """The handle of a rank that feeds no server."""

    streams, bucket_copies, recomputes = True, 2, True

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def targets(self) -> Mapping[str, Tensor]:
        return {}

    def new_buffer(self, num_bytes: int, device: torch.device) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def begin_update(self) -> None:
        """Nothing to do, as in all below: it is never called here."""

    def write_shards(self, shards: Mapping[str, Tensor], fault: str = "") -> None: ...

    def finish_update(self) -> str:
        return ""

    def commit_update(self, version: int) -> None: ...

    def abort_update(self, intact: bool) -> None: ...


class Turns:
    """One package pushes at a time: ``name`` waits for its turns, as the main process gives them out."""

    def __init__(self, name: str, port: int) -> None:
        self._store, self._name, self._count = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=WAIT), name, 0

    def wait(self) -> None:
        self._store.wait([f"{self._name}/turn/{self._count}"])

    def done(self) -> None:
        """By one rank alone."""
        self._store.set(f"{self._name}/done/{self._count}", "")

    def next(self) -> None:
        self._count += 1


@functools.lru_cache(maxsize=3)
def logical(name: str) -> Tensor:
    """The values of a logical tensor, the same on all ranks."""
    rows, cols = (*logical_tensors(ARCHITECTURE)[name], 1)[:2]
    return torch.empty(rows, cols).normal_(std=0.02, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def held(layout: Layout, rank: int) -> dict[str, Tensor]:
    """The tensors of ``rank``."""
    tensors = {}
    for shard in layout.shards(rank):
        matrix = torch.zeros(shard.matrix_shape, dtype=torch.bfloat16)
        for s in shard.spans:
            values = logical(s.tensor)[s.row_start : s.row_stop, s.col_start : s.col_stop]
            matrix[s.row : s.row + s.num_rows, s.col : s.col + s.num_cols] = values
        tensors[shard.name] = matrix.view(shard.shape)
    return tensors


def measure(where: str, rounds: int, turns: Turns | None = None) -> dict:
    """The figures of each limit, on every rank of a group of `WORLD`.

    Args:
        where: the Python of SGLang's environment, or the url of a running server.
    """
    rank, target = dist.get_rank(), rollout_layout(ARCHITECTURE, TP, [range(TP)])
    group = dist.new_group(list(range(TP)))
    source = megatron_layout(ARCHITECTURE, RankGrid(ParallelSizes(**SIZES), WORLD), VOCAB)
    tensors = held(source, rank)
    options: dict[str, Any] = {"server": {"python": where, "context_length": 64, "max_total_tokens": 256}}
    options = {"urls": [where]} if where.startswith("http") else options
    engine = None
    if rank < TP:
        engine = SGLangEngine(ARCHITECTURE, target, rank, torch.bfloat16, tp_group=group, max_running=2, **options)
    try:
        syncs = {
            name: WeightSync(source, engine or NoEngine(target), rank, wire_dtype=torch.bfloat16, max_staging_bytes=cap)
            for name, cap in LIMITS.items()
        }
        return Pushes(syncs, tensors, turns).figures(rounds)
    finally:
        if engine is not None:
            engine.close()


class Pushes:
    """Pushes at all limits in turn, on one rank."""

    def __init__(self, syncs: Mapping[str, WeightSync], tensors: Mapping[str, Tensor], turns: Turns | None) -> None:
        self._syncs, self._tensors, self._turns, self._version = syncs, tensors, turns, 0
        self._reports: dict[str, Any] = {}
        self._cpu: dict[str, list[float]] = {name: [] for name in syncs}

    def figures(self, rounds: int) -> dict:
        for name in self._syncs:  # plans, and is not counted
            self._in_turn(functools.partial(self._push, name))
        seconds: dict[str, list[float]] = {name: [] for name in self._syncs}
        grown: dict[str, list[float]] = {name: [] for name in self._syncs}
        for _ in range(rounds):
            for name, found in seconds.items():
                found.append(self._in_turn(functools.partial(self._timed, name)))
        for _ in range(MEMORY_ROUNDS):
            for name, found in grown.items():
                found.append(self._in_turn(lambda: growth(functools.partial(self._push, name))))  # noqa: B023  called here
        return {name: self._row(name, seconds[name], grown[name]) for name in self._syncs}

    def _row(self, name: str, seconds: Iterable[float], grown: Iterable[float]) -> dict:
        report = self._reports[name]
        kept = sum(tensor.nbytes for tensor in getattr(self._syncs[name], "_staged", {}).values())
        peak = getattr(report, "peak_bytes", report.transfer.peak_staging_bytes)
        return {
            "wall_s": round(statistics.median(seconds), 4),
            "cpu_s": round(statistics.median(self._cpu[name]), 4),
            "peak_extra_bytes": int(over_ranks(peak + kept)),
            "resident_growth_bytes": int(statistics.median(grown)),
            "kept_bytes": int(over_ranks(kept)),
            "buckets": getattr(report, "num_buckets", 1),
            "buckets_over_the_limit": getattr(report, "num_oversized", 0),
        }

    def _in_turn(self, action: Any) -> float:
        """What ``action`` returns on the worst rank."""
        if self._turns is not None and dist.get_rank() == 0:
            self._turns.wait()
        dist.barrier()
        found = over_ranks(action())
        if self._turns is not None:
            if dist.get_rank() == 0:
                self._turns.done()
            self._turns.next()
        return found

    def _timed(self, name: str) -> float:
        start, cpu = time.perf_counter(), time.process_time()
        self._push(name)
        wall = time.perf_counter() - start
        self._cpu[name].append(over_ranks(time.process_time() - cpu, dist.ReduceOp.SUM))
        return wall

    def _push(self, name: str) -> float:
        self._version += 1
        self._reports[name] = self._syncs[name].push(self._tensors, self._version)
        return 0.0


def over_ranks(value: float, how: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> float:
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, how)
    return float(found)


def compare(packages: Mapping[str, Path], where: str, rounds: int) -> dict:
    """The figures of each package: a server, and four ranks of each that take turns."""
    from megatron_rl.rollout.sglang.model_folder import write_model_folder
    from megatron_rl.rollout.sglang.server import ServerConfig, SGLangServer

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=WAIT)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_model_folder(folder / "model", ARCHITECTURE, None, "bfloat16")
        config = ServerConfig(python=where, context_length=64, max_total_tokens=256)
        options: dict[str, Any] = {"tp": TP, "max_running": 2, "with_tokenizer": False}
        is_url = where.startswith("http")
        url = where if is_url else stack.enter_context(SGLangServer(folder / "model", config, **options)).url
        running = []
        for name, package in packages.items():
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
            own = [__file__, "--sglang", url, "--rounds", str(rounds), "--turns", name, str(store.port)]
            ranks = subprocess.Popen([*launch, *own], env=os.environ | {"PYTHONPATH": str(package)})
            stack.callback(ranks.terminate)
            running.append(ranks)
        for turn in range((1 + rounds + MEMORY_ROUNDS) * len(LIMITS)):
            for name in packages:
                store.set(f"{name}/turn/{turn}", "")
                store.wait([f"{name}/done/{turn}"])
        figures = {name: json.loads(store.get(f"{name}/figures")) for name in packages}
        for ranks in running:
            ranks.wait(WAIT.total_seconds())
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang", required=True, help="Python of SGLang's environment, or the url of a server at TP2")
    parser.add_argument("--package", type=Path, help="root of another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turns", nargs=2, metavar=("NAME", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turns:
        name, port = arguments.turns[0], int(arguments.turns[1])
        current_platform().init_process_group(timeout=1800)
        figures = measure(arguments.sglang, arguments.rounds, Turns(name, port))
        if dist.get_rank() == 0:
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=WAIT)
            store.set(f"{name}/figures", json.dumps(figures))
        dist.barrier()
        dist.destroy_process_group()
        return
    packages = {"this": Path(__file__).resolve().parents[1]}
    packages |= {"other": arguments.package.resolve()} if arguments.package else {}
    print(json.dumps(compare(packages, arguments.sglang, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
