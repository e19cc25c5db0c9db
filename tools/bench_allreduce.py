"""Flat gloo against the hybrid all-reduce on simulated clusters: one JSON object on the last line.

Nodes are network namespaces whose links are shaped (root and iproute2 needed); flat and hybrid take turns, figures are
medians. ``bound`` is the ratio that the links alone allow: bytes that leave the busiest node by a ring over all ranks,
over those of the hierarchical exchange. ``least_ms`` is the time of the latter at the links' rates, with 66 bytes of
headers for each 1448 of data, ``of_least`` what the hybrid path took over it. On the unshaped loopback the selector
should leave the library alone; ``deterministic_ms`` is the path that `deterministic: true` takes there.
``simulated`` is what `megatron-rl plan --all-reduce` says of the same cluster, its speeds taken from the 2x2 one.

    make bench-allreduce
    python tools/bench_allreduce.py [--rounds 5] [--cases 2x2 2x4] [--sizes-mb 4]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simulated_cluster import Cluster, why_not

from megatron_rl.collectives.cost_model import Line
from megatron_rl.collectives.simulator import ClusterConfig, LinkConfig, hierarchical, library

MB = 2**20
HEADERS = 1514 / 1448  # Ethernet frames over the TCP data in them
PROGRAM = Path(__file__).with_name("allreduce_ranks.py")


@dataclass(frozen=True)
class Case:
    name: str
    nodes: int
    ranks: int  # of each node
    sizes_mb: tuple[float, ...]
    links: dict[str, str] = field(default_factory=lambda: {"eth0": "200mbit"})
    interleaved: bool = False

    @property
    def rates(self) -> list[int]:
        """Mbit/s of each link that has a limit."""
        return [int(rate.removesuffix("mbit")) for rate in self.links.values() if rate]

    @property
    def bound(self) -> float:
        size, nodes = self.nodes * self.ranks, self.nodes
        flat = 2 * (size - 1) / size * (self.ranks if self.interleaved else 1)
        second = sum(self.rates) / self.rates[0] if self.rates else 1.0
        return flat / (2 * (nodes - 1) / nodes) * second

    def least_ms(self, size_mb: float) -> float:
        """Of the hierarchical exchange, whose 2 (n - 1) / n of the message leaves each node over all links."""
        return 2 * (self.nodes - 1) / self.nodes * size_mb * MB * HEADERS / (sum(self.rates) * 1e6 / 8) * 1e3


CASES = (
    Case("2x2", 2, 2, (4, 16, 64)),
    Case("2x4", 2, 4, (4, 16, 64)),
    Case("4x2", 4, 2, (4, 16)),
    Case("2x2 interleaved", 2, 2, (4, 16), interleaved=True),
    Case("2x2 two links", 2, 2, (4, 16, 64), {"eth0": "200mbit", "eth1": "100mbit"}),
    Case("2x2 loopback", 2, 2, (1, 4, 16, 64), {"eth0": ""}),
)


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """The reports of one cluster."""
    if not case.rates:  # short, and of the processors rather than the links: more of them for a steady median
        rounds *= 4
    command = [sys.executable, str(PROGRAM), "--rounds", str(rounds), "--counted", *case.links]
    command += ["--sizes-mb", *map(str, case.sizes_mb), "--links", *(case.links if len(case.links) > 1 else ())]
    if not case.rates:
        command.append("--deterministic")
    with Cluster(case.nodes, case.links) as cluster:
        ranks = cluster.start(command, case.ranks, interleaved=case.interleaved, TOPOLOGY=case.name)
        outputs = [process.communicate(timeout=900) for process in ranks]
        failed = [rank for rank, process in enumerate(ranks) if process.returncode]
        if failed:
            raise RuntimeError(f"{case.name}: rank {failed[0]} failed: {outputs[failed[0]][1][-2000:]}")
    reports = [json.loads(line) | {"bound": case.bound} for line in outputs[0][0].splitlines()]
    for report in reports:
        if case.rates:
            report["least_ms"] = case.least_ms(report["size_mb"])
            report["of_least"] = report["hybrid_ms"] / report["least_ms"]
    return reports


def calibrated(reports: list[dict[str, Any]]) -> ClusterConfig:
    """The machine's speeds, from flat and hybrid times of one cluster of 2 x 2 ranks.

    Flat gloo gives latency and rate of the links by two sizes. What the hybrid path takes beyond its links at the
    largest size is work in node memory, of which half a chunk's worth is not hidden.
    """
    small, large = min(reports, key=_size), max(reports, key=_size)
    flat = Line.fitted([(int(_size(r) * MB), r["flat_ms"] / 1e3) for r in (small, large)])
    link = LinkConfig(gbytes_per_s=1.5 / flat.seconds_per_byte / 1e9, latency_us=flat.latency / 6 * 1e6)
    base = ClusterConfig(ranks_per_node=2, inside=LinkConfig(gbytes_per_s=20), between=link, library="ring")
    best, error = base, float("inf")
    for gbytes_per_s in (0.05 * 1.1**k for k in range(80)):
        guess = base.model_copy(update={"host_memory_gbytes_per_s": gbytes_per_s})
        off = abs(hierarchical(guess, 2, _size(large) * MB).seconds - large["hybrid_ms"] / 1e3)
        if off <= error:
            best, error = guess, off
    return best


def simulated(speeds: ClusterConfig, case: Case, size_mb: float) -> dict[str, float]:
    """Milliseconds of both ways on another cluster of the same machine."""
    rates = case.rates
    order = "interleaved" if case.interleaved else "by_node"
    # All nodes are on one machine and share its processors and memory.
    memory = speeds.host_memory_gbytes_per_s * 2 / case.nodes
    crowd = case.nodes * case.ranks / 4
    cluster = speeds.model_copy(
        update={
            "ranks_per_node": case.ranks,
            "rank_order": order,
            "host_memory_gbytes_per_s": memory,
            "chunk_us": speeds.chunk_us * crowd,
            "send_us": speeds.send_us * crowd,
        }
    )
    if len(rates) > 1:
        first = cluster.between
        second = first.model_copy(update={"gbytes_per_s": first.gbytes_per_s * rates[1] / rates[0]})
        cluster = cluster.model_copy(update={"second": second})
    ways = {
        "flat": library(cluster, case.nodes, size_mb * MB),
        "hybrid": hierarchical(cluster, case.nodes, size_mb * MB, second=len(rates) > 1),
    }
    return {way: path.seconds * 1e3 for way, path in ways.items()}


def _size(report: dict[str, Any]) -> float:
    return report["size_mb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--sizes-mb", type=float, nargs="+", help="instead of the cases' own")
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(f"no simulated cluster here: {reason}")
    cases: list[dict[str, Any]] = []
    speeds = None
    for case in CASES:
        if case.name not in args.cases:
            continue
        case = replace(case, sizes_mb=tuple(args.sizes_mb or case.sizes_mb))
        reports = measure(case, args.rounds)
        speeds = speeds or (calibrated(reports) if case.name == "2x2" else None)
        for report in reports:
            times = f"{report['flat_ms']:.1f} / {report['hybrid_ms']:.1f} ms = {report['ratio']:.2f}"
            line = (
                f"{report['topology']:18} {report['size_mb']:>5} MB  {times} (bound {case.bound:.2f}), {report['path']}"
            )
            if "of_least" in report:
                line += f", {report['of_least']:.2f} of the least time"
            if speeds is not None and all(case.links.values()):
                report["simulated"] = simulated(speeds, case, report["size_mb"])
                off = (f"{way} {report['simulated'][way] / report[f'{way}_ms'] - 1:+.0%}" for way in ("flat", "hybrid"))
                line += f"  simulated: {', '.join(off)}"
            cases.append(report)
            print(line, flush=True)
    print(json.dumps({"benchmark": "allreduce", "cases": cases}))


if __name__ == "__main__":
    main()
