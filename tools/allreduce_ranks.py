"""One rank of `bench_allreduce.py` and of the tests on simulated clusters: flat gloo and the hybrid paths in turn.

Rank 0 prints one JSON object a line. Times are of the slowest rank; bytes are those that left this node's interface, of
the busiest node (interface counters, so headers and acknowledgements are in them).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.collectives.hybrid import HybridAllReduce
from megatron_rl.collectives.policy import CollectivesConfig


def sent_bytes(links: list[str]) -> int:
    """Bytes that left this network namespace so far."""
    return sum(int(Path(f"/sys/class/net/{link}/statistics/tx_bytes").read_text()) for link in links)


def largest(value: float) -> float:
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def measured(run: Callable[[], object], links: list[str]) -> tuple[float, float]:
    """(seconds of the slowest rank, bytes of the busiest node) of one call."""
    dist.barrier()
    before, started = sent_bytes(links), time.perf_counter()
    run()
    seconds = largest(time.perf_counter() - started)
    return seconds, largest(sent_bytes(links) - before)


def group(name: str, config: CollectivesConfig) -> HybridAllReduce:
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    return HybridAllReduce(store, dist.group.WORLD, config, torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes-mb", type=float, nargs="+", default=[4.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--links", nargs="*", default=[])
    parser.add_argument("--counted", nargs="*", default=["eth0"])
    parser.add_argument("--deterministic", action="store_true", help="measure that path as well")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    config = CollectivesConfig(all_reduce="hybrid", reuse_calibration=False, links=tuple(args.links))
    hybrid = group("hybrid", config)
    hybrid.all_reduce(torch.zeros(1)).wait()  # calibrates
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "flat": dist.all_reduce,
        "hybrid": lambda x: hybrid.all_reduce(x).wait(),
    }
    if args.deterministic:
        ordered = group("ordered", config.model_copy(update={"deterministic": True}))
        ways["deterministic"] = lambda x: ordered.all_reduce(x).wait()
    for size_mb in args.sizes_mb:
        numel = int(size_mb * 2**20) // 4
        start = torch.randn(numel, generator=torch.Generator().manual_seed(rank))
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        results = {}
        for turn in range(args.rounds):
            for name, way in list(ways.items())[:: -1 if turn % 2 else 1]:  # neither always comes after the other
                results[name] = start.clone()
                rounds[name].append(measured(lambda way=way, x=results[name]: way(x), args.counted))
        exact = sum(torch.randn(numel, generator=torch.Generator().manual_seed(r)).double() for r in range(size))
        error = float((results["hybrid"].double() - exact).norm() / exact.norm())
        choice = hybrid.selectors()["all_reduce"].now(numel * 4)
        report = {
            "topology": os.environ.get("TOPOLOGY", f"{hybrid.nodes.num_nodes}x{size // hybrid.nodes.num_nodes}"),
            "size_mb": size_mb,
            "path": choice.path,
            "predicted_ms": choice.predicted * 1e3,
            "error": error,
        }
        for name, figures in rounds.items():
            report[f"{name}_ms"] = statistics.median(seconds for seconds, _ in figures) * 1e3
            report[f"{name}_bytes"] = statistics.median(count for _, count in figures)
        report["ratio"] = report["flat_ms"] / report["hybrid_ms"]
        if rank == 0:
            print(json.dumps(report), flush=True)
    hybrid.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
