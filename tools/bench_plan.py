"""How long planning takes for a 671B mixture of experts: 4,096 trainer ranks into 32 rollout replicas of TP32.

Measures one rank's own part (the worse of a trainer rank and a rollout rank, each in a fresh process, layouts
included) and the certificate of the whole job. Prints one JSON object on the last line: seconds, and peak resident
memory in MB beyond what the imports take.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from megatron_rl.models import Architecture, Experts, megatron_layout, rollout_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard import ReshardPlan, Topology
from megatron_rl.reshard.certificate import certify

TRAINERS, REPLICAS, ROLLOUT_TP, RANKS_PER_NODE = 4096, 32, 32, 8
SIZES = ParallelSizes(tp=8, pp=16, ep=64)
# The shape of DeepSeek-V3 with grouped-query attention in place of MLA: 61 layers, the first 3 dense, 256 experts.
ARCHITECTURE = Architecture(
    family="qwen3_moe",
    num_layers=61,
    hidden=7168,
    ffn=18432,
    num_heads=128,
    num_kv_heads=8,
    head_dim=128,
    vocab=129280,
    tied=False,
    qk_norm=True,
    experts=Experts(256, 8, 2048, dense_layers=(0, 1, 2)),
)


def make_plan() -> ReshardPlan:
    source = megatron_layout(ARCHITECTURE, RankGrid(SIZES, TRAINERS), padded_vocab=129280)
    replicas = [range(TRAINERS + i * ROLLOUT_TP, TRAINERS + (i + 1) * ROLLOUT_TP) for i in range(REPLICAS)]
    return ReshardPlan(source, rollout_layout(ARCHITECTURE, ROLLOUT_TP, replicas), Topology(RANKS_PER_NODE))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(what: str) -> dict[str, object]:
    """Run in a process of its own, so that its peak memory is that of this measurement."""
    imports_mb, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    plan = make_plan()
    result: object = certify(plan) if what == "certificate" else plan.for_rank(int(what))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return {"s": seconds, "cpu_s": cpu_seconds, "peak_mb": peak_mb() - imports_mb, "text": str(result)}


def measure_apart(what: str) -> dict:
    out = subprocess.run([sys.executable, __file__, "--only", what], check=True, capture_output=True, text=True)
    found = json.loads(out.stdout.splitlines()[-1])
    print(f"{what}: {found['s']:.2f} s ({found['cpu_s']:.2f} CPU-s), {found['peak_mb']:.0f} MB\n{found['text']}\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="a rank, or 'certificate': measure that in this process")
    only = parser.parse_args().only
    if only:
        print(json.dumps(measure(only)))
        return
    ranks = [measure_apart(str(rank)) for rank in (0, TRAINERS // 2, TRAINERS, TRAINERS + REPLICAS * ROLLOUT_TP // 2)]
    certificate = measure_apart("certificate")
    figures = {
        "rank_s": max(found["s"] for found in ranks),
        "rank_cpu_s": max(found["cpu_s"] for found in ranks),
        "rank_peak_mb": max(found["peak_mb"] for found in ranks),
        "certificate_s": certificate["s"],
        "certificate_cpu_s": certificate["cpu_s"],
        "certificate_peak_mb": certificate["peak_mb"],
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
