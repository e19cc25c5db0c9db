"""Flat gloo against the hybrid all-reduce on simulated clusters: one JSON object on the last line.

Nodes are network namespaces whose links are shaped (root and iproute2 needed); flat and hybrid take turns, figures are
medians. ``bound`` is the ratio that the links alone allow: bytes that leave the busiest node by a ring over all ranks,
over those of the hierarchical exchange. ``least_ms`` is the time of the latter at the links' rates, with 66 bytes of
headers for each 1448 of data, ``of_least`` what the hybrid path took over it. On the unshaped loopback the selector
should leave the library alone; ``deterministic_ms`` is the path that `deterministic: true` takes there.
``simulated`` is what `megatron-rl plan --all-reduce` says of the same cluster and the path that was taken; links are as
fast as flat gloo found them on 2x2, pieces and bytes in node memory cost what the deterministic path took on loopback.

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

from megatron_rl.collectives.cost_model import LIBRARY, Line
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
    Case("2x2 loopback", 2, 2, (1, 4, 16, 64), {"eth0": ""}),  # first: the simulation needs it
    Case("2x2", 2, 2, (4, 16, 64)),
    Case("2x4", 2, 4, (4, 16, 64)),
    Case("4x2", 4, 2, (4, 16)),
    Case("2x2 interleaved", 2, 2, (4, 16), interleaved=True),
    Case("2x2 two links", 2, 2, (4, 16, 64), {"eth0": "200mbit", "eth1": "100mbit"}),
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


def calibrated(shaped: list[dict[str, Any]], loopback: list[dict[str, Any]]) -> ClusterConfig:
    """The machine's speeds, from reports of two clusters of 2 x 2 ranks: one with links of a rate, one without a limit.

    Flat gloo gives latency and rate of the links by two sizes. The path through node memory on the loopback is work of
    the processors alone: so much for a piece and so much for a byte, again by two sizes.
    """
    small, large = min(shaped, key=_size), max(shaped, key=_size)
    flat = Line.fitted([(int(_size(r) * MB), r["flat_ms"] / 1e3) for r in (small, large)])
    link = LinkConfig(gbytes_per_s=1.5 / flat.seconds_per_byte / 1e9, latency_us=flat.latency / 6 * 1e6)
    none = LinkConfig(gbytes_per_s=1e9, latency_us=0)
    base = ClusterConfig(ranks_per_node=2, inside=LinkConfig(gbytes_per_s=20), between=none, library="ring")

    def work(size_mb: float, seconds_per_gb: float, chunk_us: float) -> float:
        update = {"host_memory_gbytes_per_s": 1 / seconds_per_gb, "chunk_us": chunk_us, "send_us": 0.0}
        return hierarchical(base.model_copy(update=update), 2, size_mb * MB).seconds

    ends = min(loopback, key=_size), max(loopback, key=_size)
    taken = [report["deterministic_ms"] / 1e3 for report in ends]
    of_bytes = [work(_size(report), 1.0, 0.0) for report in ends]
    of_pieces = [work(_size(report), 1e-9, 1.0) for report in ends]
    # taken = of_bytes * seconds_per_gb + of_pieces * chunk_us, for both
    area = of_bytes[0] * of_pieces[1] - of_bytes[1] * of_pieces[0]
    seconds_per_gb = (taken[0] * of_pieces[1] - taken[1] * of_pieces[0]) / area
    chunk_us = (of_bytes[0] * taken[1] - of_bytes[1] * taken[0]) / area
    speeds = {"host_memory_gbytes_per_s": 1 / max(seconds_per_gb, 1e-9), "chunk_us": max(chunk_us, 0.0)}
    return base.model_copy(update=speeds | {"between": link, "send_us": 0.0})


def simulated(speeds: ClusterConfig, case: Case, size_mb: float, path: str) -> dict[str, float]:
    """Milliseconds of both ways on another cluster of the same machine, where hybrid takes ``path``."""
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
        }
    )
    if len(rates) > 1:
        first = cluster.between
        second = first.model_copy(update={"gbytes_per_s": first.gbytes_per_s * rates[1] / rates[0]})
        cluster = cluster.model_copy(update={"second": second})
    flat = library(cluster, case.nodes, size_mb * MB)
    other = hierarchical(cluster, case.nodes, size_mb * MB, second=len(rates) > 1)
    return {"flat": flat.seconds * 1e3, "hybrid": (flat if path == LIBRARY else other).seconds * 1e3}


def _size(report: dict[str, Any]) -> float:
    return report["size_mb"]


def line(report: dict[str, Any]) -> str:
    """A report for people."""
    times = f"{report['flat_ms']:.1f} / {report['hybrid_ms']:.1f} ms = {report['ratio']:.2f}"
    text = f"{report['topology']:18} {report['size_mb']:>5} MB  {times} (bound {report['bound']:.2f}), {report['path']}"
    if "of_least" in report:
        text += f", {report['of_least']:.2f} of the least time"
    if "simulated" in report:
        off = (f"{way} {report['simulated'][way] / report[f'{way}_ms'] - 1:+.0%}" for way in ("flat", "hybrid"))
        text += f"  simulated: {', '.join(off)}"
    return text


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
    measured: dict[str, list[dict[str, Any]]] = {}
    for case in CASES:
        if case.name not in args.cases:
            continue
        case = replace(case, sizes_mb=tuple(args.sizes_mb or case.sizes_mb))
        reports = measured[case.name] = measure(case, args.rounds)
        speeds = None
        if case.rates and {"2x2", "2x2 loopback"} <= set(measured) and len(measured["2x2 loopback"]) > 1:
            speeds = calibrated(measured["2x2"], measured["2x2 loopback"])
        for report in reports:
            if speeds is not None:
                report["simulated"] = simulated(speeds, case, report["size_mb"], report["path"])
            cases.append(report)
            print(line(report), flush=True)
    print(json.dumps({"benchmark": "allreduce", "cases": cases}))


if __name__ == "__main__":
    main()
