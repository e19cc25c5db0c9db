"""Test program on 4 ranks: every collective against sums in its own order.

Nodes are made up: which ranks share one is given, so that every division of four ranks can be tried on one machine.
Rank 0 prints a line for each case that held.
"""

from __future__ import annotations

import itertools
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.collectives import calibrations, selector
from megatron_rl.collectives.hierarchical import HierarchicalPath
from megatron_rl.collectives.hybrid import HybridAllReduce
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.policy import CollectivesConfig
from megatron_rl.collectives.process_group import register_backend

MAPS = (
    ((0, 1), (2, 3)),
    ((0, 2), (1, 3)),
    ((0,), (1, 2, 3)),
    ((0, 1, 2, 3),),
    ((0,), (1,), (2,), (3,)),
)
SIZE = 4
CPU = torch.device("cpu")
numbers = itertools.count()


def store() -> dist.Store:
    """A prefix that no other case uses; every rank counts alike."""
    return dist.PrefixStore(f"case{next(numbers)}", dist.distributed_c10d._get_default_store())


def inputs(numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
    scale = 10.0 ** torch.arange(SIZE)  # unequal numbers: another order of the sum gives other bits
    return [
        (torch.randn(numel, generator=torch.Generator().manual_seed(7 + rank)) * scale[rank]).to(dtype)
        for rank in range(SIZE)
    ]


def ordered_sum(parts: list[torch.Tensor], nodes: NodeMap, wire: torch.dtype) -> torch.Tensor:
    """Each node's ranks in order, in fp32; what travels is rounded to ``wire``; then node after node."""
    total = torch.zeros(0)
    for node, ranks in enumerate(nodes.nodes):
        part = parts[ranks[0]].float()
        for rank in ranks[1:]:
            part = part + parts[rank].float()
        if nodes.num_nodes > 1:
            part = part.to(wire).float()
        total = part if node == 0 else total + part
    if nodes.num_nodes > 1:
        total = total.to(wire).float()
    return total.to(parts[0].dtype)


def every_division(rank: int) -> None:
    for nodes, links in itertools.product(map(NodeMap, MAPS), ((), ("lo", "lo"))):
        # unchecked: one interface stands for two
        config = CollectivesConfig.model_construct(chunk_mb=0.01, links=links, timeout_seconds=30.0)
        path = HierarchicalPath(store(), rank, nodes, config, CPU)
        if links:
            path.pipeline.shares = {0: 1.0, 1: 2.0}
        for numel, dtype in itertools.product((1, 7, 5003), (torch.float32, torch.bfloat16)):
            parts = inputs(numel * SIZE, dtype)
            expected = ordered_sum(parts, nodes, dtype)
            summed = parts[rank].clone()
            path.all_reduce(summed)
            assert torch.equal(summed, expected), f"all_reduce {nodes.nodes} {numel} {dtype}"
            own = torch.empty(numel, dtype=dtype)
            path.reduce_scatter(own, parts[rank])
            assert torch.equal(own, expected.view(SIZE, -1)[rank]), f"reduce_scatter {nodes.nodes} {numel} {dtype}"
            gathered = torch.empty_like(expected)
            path.all_gather(gathered, own)
            assert torch.equal(gathered, expected), f"all_gather {nodes.nodes} {numel} {dtype}"
        say(rank, f"division {nodes.nodes} over {len(links) or 1} links")


def narrow_wire(rank: int) -> None:
    nodes = NodeMap(MAPS[0])
    config = CollectivesConfig(wire_dtype="bfloat16", error_feedback=True, timeout_seconds=30)
    path = HierarchicalPath(store(), rank, nodes, config, CPU)
    parts = inputs(1000, torch.float32)
    plain = CollectivesConfig(wire_dtype="bfloat16", timeout_seconds=30)
    once = parts[rank].clone()
    HierarchicalPath(store(), rank, nodes, plain, CPU).all_reduce(once)
    assert torch.equal(once, ordered_sum(parts, nodes, torch.bfloat16)), "bf16 on the wire"
    exact, total = sum(part.double() for part in parts), torch.zeros(1000, dtype=torch.float64)
    for _ in range(32):
        step = parts[rank].clone()
        path.all_reduce(step, "buffer")
        total += step.double()
    drift, biased = (total / 32 - exact).norm(), (once.double() - exact).norm()
    assert drift < biased / 8, f"error feedback leaves {drift} of {biased}"
    say(rank, "bf16 on the wire, with and without error feedback")


def process_group(rank: int) -> None:
    for deterministic in (False, True):
        config = CollectivesConfig(
            all_reduce="hybrid", reuse_calibration=False, deterministic=deterministic, timeout_seconds=30
        )
        group = dist.new_group(list(range(SIZE)), backend=register_backend(config))
        total = SIZE * (SIZE + 1) / 2
        for asynchronous in (False, True):
            x = torch.full((1000,), float(rank + 1))
            finish(dist.all_reduce(x, group=group, async_op=asynchronous))
            assert (x == total).all()
            finish(dist.all_reduce(x, op=dist.ReduceOp.AVG, group=group, async_op=asynchronous))
            assert (x == total).all()
            integers = torch.full((10,), rank)
            finish(dist.all_reduce(integers, op=dist.ReduceOp.MAX, group=group, async_op=asynchronous))
            assert (integers == SIZE - 1).all()
            coalesced(rank, group, asynchronous, total)
        gathered: list[int | None] = [None] * SIZE
        dist.all_gather_object(gathered, rank, group=group)
        assert gathered == list(range(SIZE))
        say(rank, f"process group, deterministic={deterministic}")


def coalesced(rank: int, group: dist.ProcessGroup, asynchronous: bool, total: float) -> None:
    """As Megatron's `start_grad_sync` and `start_param_sync` call them."""
    for kind in ("all_reduce", "reduce_scatter", "all_gather"):
        wholes = [torch.full((4 * SIZE,), float(rank + 1)) for _ in range(3)]
        parts = [torch.full((4,), float(rank + 1)) for _ in range(3)]
        with dist.distributed_c10d._coalescing_manager(group, async_ops=asynchronous) as manager:
            for whole, part in zip(wholes, parts, strict=True):
                if kind == "all_reduce":
                    dist.all_reduce(whole, group=group, async_op=asynchronous)
                elif kind == "reduce_scatter":
                    dist.reduce_scatter_tensor(part, whole, group=group, async_op=asynchronous)
                else:
                    dist.all_gather_into_tensor(whole, part, group=group, async_op=asynchronous)
        if asynchronous:
            manager.wait()
        results = {"all_reduce": wholes, "reduce_scatter": parts}.get(kind)
        if results is not None:
            assert all((result == total).all() for result in results), kind
        else:
            expected = torch.arange(1.0, SIZE + 1).repeat_interleave(4)
            assert all(torch.equal(whole, expected) for whole in wholes), kind


def many_at_once(rank: int) -> None:
    """Operations begun without waiting, of every size and both paths, finish in order with the right sums."""
    library = dist.new_group(list(range(SIZE)))
    hybrid = HybridAllReduce(
        store(),
        library,
        CollectivesConfig(all_reduce="hybrid", reuse_calibration=False, chunk_mb=0.05, minimum_gain=0.0),
        torch.device("cpu"),
        NodeMap(MAPS[0]),
    )
    tensors, futures = [], []
    for step in range(20):
        parts = inputs(1 + 3001 * step, torch.float32)
        tensors.append((parts[rank].clone(), sum(part.double() for part in parts)))
        futures.append(hybrid.all_reduce(tensors[-1][0]))
    for future, (found, exact) in zip(futures, tensors, strict=True):
        future.wait(timedelta(seconds=120))
        assert (found.double() - exact).norm() <= 1e-6 * exact.norm()
    hybrid.close()
    say(rank, "many at once")


def calibrated_before(rank: int) -> None:
    """What the first engine measured the second one takes over, on all ranks; another topology is measured itself."""
    library = dist.new_group(list(range(SIZE)))
    with tempfile.TemporaryDirectory() as folder:
        calibrations.cache_folder = lambda: Path(folder)
        counts = []
        for chunk_mb in (0.5, 0.5, 0.25):
            config = CollectivesConfig(all_reduce="hybrid", chunk_mb=chunk_mb, timeout_seconds=30)
            hybrid = HybridAllReduce(store(), library, config, torch.device("cpu"), NodeMap(MAPS[0], ("a", "b")))
            x = torch.full((1000,), float(rank + 1))
            hybrid.all_reduce(x).wait(timedelta(seconds=120))
            assert (x == SIZE * (SIZE + 1) / 2).all()
            counts.append(hybrid.selectors()["all_reduce"].num_calibrations)
            hybrid.close()
        assert counts == [1, 0, 1], counts
        if rank == 0:
            lines = list(calibrations.saved_choices())
            assert (
                sum(line.startswith("2 nodes of 2 ranks (a, b), cpu, over the default interface") for line in lines)
                == 2
            )
            assert sum("all_reduce" in line and "predicted" in line for line in lines) == 10, lines
        dist.barrier()
    say(rank, "calibration of an earlier run")


def finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def say(rank: int, what: str) -> None:
    dist.barrier()
    if rank == 0:
        print(f"held: {what}", flush=True)


def main() -> None:
    selector.SIZES = (1 << 16, 1 << 18)  # what is measured does not matter here
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for case in (every_division, narrow_wire, process_group, many_at_once, calibrated_before):
        case(rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
