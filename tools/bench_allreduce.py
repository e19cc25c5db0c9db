"""Flat gloo against the hybrid all-reduce on simulated clusters: one JSON object on the last line.

Nodes are network namespaces whose links are shaped (root and iproute2 needed); flat and hybrid take turns, figures are
medians. ``bound`` is the ratio that the links alone allow: bytes that leave the busiest node by a ring over all ranks,
over those of the hierarchical exchange. On the unshaped loopback the selector should leave the library alone.

    make bench-allreduce
    python tools/bench_allreduce.py [--rounds 5] [--only 2x2]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from simulated_cluster import Cluster, why_not

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
    def bound(self) -> float:
        size, nodes = self.nodes * self.ranks, self.nodes
        flat = 2 * (size - 1) / size * (self.ranks if self.interleaved else 1)
        rates = [int(rate.removesuffix("mbit")) for rate in self.links.values() if rate]
        second = sum(rates) / rates[0] if rates else 1.0
        return flat / (2 * (nodes - 1) / nodes) * second


CASES = (
    Case("2x2", 2, 2, (4, 16, 64)),
    Case("2x4", 2, 4, (4, 16, 64)),
    Case("4x2", 4, 2, (4, 16)),
    Case("2x2 interleaved", 2, 2, (4,), interleaved=True),
    Case("2x2 two links", 2, 2, (4, 16), {"eth0": "200mbit", "eth1": "100mbit"}),
    Case("2x2 loopback", 2, 2, (1, 4, 16), {"eth0": ""}),
)


def measure(case: Case, rounds: int) -> list[dict[str, object]]:
    """The reports of one cluster."""
    command = [sys.executable, str(PROGRAM), "--rounds", str(rounds), "--counted", *case.links]
    command += ["--sizes-mb", *map(str, case.sizes_mb), "--links", *(case.links if len(case.links) > 1 else ())]
    with Cluster(case.nodes, case.links) as cluster:
        ranks = cluster.start(command, case.ranks, interleaved=case.interleaved, TOPOLOGY=case.name)
        outputs = [process.communicate(timeout=900) for process in ranks]
        failed = [rank for rank, process in enumerate(ranks) if process.returncode]
        if failed:
            raise RuntimeError(f"{case.name}: rank {failed[0]} failed: {outputs[failed[0]][1][-2000:]}")
    return [json.loads(line) | {"bound": case.bound} for line in outputs[0][0].splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="a part of the case's name")
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(f"no simulated cluster here: {reason}")
    cases = []
    for case in CASES:
        if args.only not in case.name:
            continue
        for report in measure(case, args.rounds):
            cases.append(report)
            print(
                f"{report['topology']:18} {report['size_mb']:>5} MB  {report['ratio']:.2f} x (bound {case.bound:.2f})"
            )
    print(json.dumps({"benchmark": "allreduce", "cases": cases}))


if __name__ == "__main__":
    main()
