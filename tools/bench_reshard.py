"""What a weight sync costs, by three ways on the same processes: one JSON object on the last line.

64M parameters of a Llama in bf16, four gloo ranks on this machine. `ours` is `megatron_rl.reshard` into SGLang's
layout, `gather` collects full tensors and slices them as slime and verl do, `mcore` is `megatron.core.resharding` into
a Megatron model of the target's tensor-parallel size (its own receiver; it has none for SGLang). The ways take turns in
each round. ``wall_s``: of the slowest rank, median over rounds. ``cpu_s``: of all ranks together, median.
``wire_bytes``: received from other ranks, over all ranks. ``peak_extra_bytes``: growth of the resident set of the worst
rank during a run, from rounds of its own (buffers that `gather` keeps between runs are not in it). All ways plan in a
first run that is not counted, and what they bring is compared bit for bit. The figures beside the keys are for
TP2 PP2 -> TP4; the other layouts are under ``layouts``, pushes into a real server under ``sglang`` (`push_to_sglang`).

    make bench-reshard
    python tools/bench_reshard.py [--rounds 9] [--sglang PYTHON|URL [--only-sglang]]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from push_to_sglang import measure as measure_pushes
from reshard_ways import Gathered, MegatronCore, Planned, Way
from resident_memory import growth
from torch import Tensor

from megatron_rl.devices import current_platform
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.engines.megatron.model.model_chunk import chunk_tensors
from megatron_rl.models import Architecture, megatron_layout, rollout_layout
from megatron_rl.parallel import ParallelContext, ParallelSizes, RankGrid
from megatron_rl.reshard import Layout, LocalTransport, Resharder, ReshardPlan, WireFormat
from megatron_rl.reshard.certificate import certify
from megatron_rl.weights.fill import empty_tensors

from megatron.core import parallel_state  # isort: skip  (after megatron_rl: the CPU face)

WORLD = 4
VOCAB = 32768  # a multiple of every padding, so that all ways move the same rows
ARCHITECTURE = Architecture("llama", 10, 512, 1536, 8, 4, 64, VOCAB, tied=False)
LAYOUTS = {"TP2PP2->TP4": ({"tp": 2, "pp": 2}, 4), "TP4->DP4": ({"tp": 4}, 1), "TP2PP2->DP4": ({"tp": 2, "pp": 2}, 1)}
MAIN = "TP2PP2->TP4"


def build(sizes: ParallelSizes, seed: int) -> tuple[ParallelContext, torch.nn.Module]:
    """A bf16 model in ``sizes``, with groups of its own."""
    parallel_state.destroy_model_parallel()
    context = ParallelContext.create(sizes, timeout=120, seed=seed)
    config = transformer_config(ARCHITECTURE, sizes, dtype=torch.bfloat16)
    return context, build_model(ARCHITECTURE, config, pg_collection=context.collection)[0]


def make_ways(sizes: ParallelSizes, rollout_tp: int) -> tuple[dict[str, Way], Layout, Layout]:
    """The three ways between the same layouts, after a first run of each and a comparison of what they brought."""
    rank = dist.get_rank()
    context, model = build(sizes, seed=1)
    _, theirs = build(ParallelSizes(tp=rollout_tp), seed=2)
    source = megatron_layout(ARCHITECTURE, context.grid, VOCAB)
    replicas = [range(first, first + rollout_tp) for first in range(0, WORLD, rollout_tp)]
    target = rollout_layout(ARCHITECTURE, rollout_tp, replicas)
    tensors = chunk_tensors([model])
    mine, gathered = (empty_tensors(target, rank, torch.bfloat16) for _ in range(2))
    ways = {
        "ours": Planned(source, target, tensors, mine),
        "gather": Gathered(context, source, target, tensors, gathered),
        "mcore": MegatronCore(model, theirs),
    }
    for way in ways.values():
        way.run()
    compare(mine, gathered)
    compare(mine, in_rollout_names(theirs, rollout_tp))
    del gathered
    return ways, source, target


def in_rollout_names(model: torch.nn.Module, tp: int) -> dict[str, Tensor]:
    """A Megatron model of the target's size holds the same slices as a rollout rank: rename them, locally."""
    rank = dist.get_rank()
    grid = RankGrid(ParallelSizes(tp=tp), WORLD)
    source = megatron_layout(ARCHITECTURE, grid, VOCAB)
    alone = Layout("theirs", {0: source.replica_of[rank]}, source.emit)
    full = rollout_layout(ARCHITECTURE, tp, [range(tp)])
    target = Layout("renamed", {0: full.replica_of[rank % tp]}, full.emit)
    into = empty_tensors(target, 0, torch.bfloat16)
    Resharder(alone, target, 0, LocalTransport()).run(chunk_tensors([model]), into)
    return into


def compare(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, tensor in left.items():
        if not torch.equal(tensor.view(torch.int16), right[name].view(torch.int16)):
            raise SystemExit(f"{name} differs on rank {dist.get_rank()}: the ways do not bring the same weights")


def timed(way: Way) -> tuple[float, float]:
    """Wall seconds of the slowest rank, CPU-seconds of all."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    way.run()
    mine = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64)
    slowest, total = mine.clone(), mine.clone()
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return float(slowest[0]), float(total[1])


def extra_bytes(way: Way) -> int:
    """Growth of the resident set of the worst rank while the way runs."""
    dist.barrier()
    grown = torch.tensor([growth(way.run)])
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    return int(grown)


def measure(sizes: ParallelSizes, rollout_tp: int, rounds: int) -> dict:
    ways, source, target = make_ways(sizes, rollout_tp)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(timed(way))
    figures: dict = {}
    for name, way in ways.items():
        received = torch.tensor([way.received_bytes])
        dist.all_reduce(received)
        figures[name] = {
            "wall_s": round(statistics.median(wall for wall, _ in times[name]), 4),
            "cpu_s": round(statistics.median(cpu for _, cpu in times[name]), 4),
            "wire_bytes": int(received),
            "peak_extra_bytes": int(statistics.median(extra_bytes(way) for _ in range(3))),
        }
    certificate = certify(ReshardPlan(source, target), WireFormat(torch.bfloat16))
    figures["minimum_bytes"] = certificate.received.lower_bound
    for other in ("mcore", "gather"):
        figures[f"wall_vs_{other}"] = round(figures["ours"]["wall_s"] / figures[other]["wall_s"], 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sglang", default="", help="Python of SGLang's environment, or the url of a server at TP2")
    parser.add_argument("--only-sglang", action="store_true")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
        sys.exit(subprocess.run([*command, __file__, *sys.argv[1:]], timeout=5400, check=False).returncode)
    current_platform().init_process_group(timeout=1200)  # a server may take minutes to start
    layouts = {}
    for name, (sizes, rollout_tp) in () if arguments.only_sglang else LAYOUTS.items():
        layouts[name] = measure(ParallelSizes(**sizes), rollout_tp, rounds)
        if dist.get_rank() == 0:
            print(name, json.dumps(layouts[name]), flush=True)
    pushes = measure_pushes(arguments.sglang, rounds) if arguments.sglang else {}
    if dist.get_rank() == 0:
        print(json.dumps(layouts.pop(MAIN, {}) | {"layouts": layouts, "sglang": pushes}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
