"""Test program on 4 ranks that share one device (argument: cuda, or cpu to rehearse): reductions of device tensors.

Made-up nodes, gloo as the library. What is queued on the caller's stream before a call counts, and what is queued after
its wait sees the result.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from collectives_program import MAPS, SIZE, inputs, ordered_sum, say, store

from megatron_rl.collectives.hybrid import HybridAllReduce
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.policy import CollectivesConfig


def busy(device: torch.device) -> torch.Tensor:
    """Queue work that takes a while; a zero that depends on it."""
    x = torch.full((1500, 1500), 1e-4, device=device)
    for _ in range(20 if device.type == "cuda" else 1):
        x = x @ x
    return x[0, 0] * 0


def main() -> None:
    dist.init_process_group("gloo")
    rank, device = dist.get_rank(), torch.device(sys.argv[1])
    nodes = NodeMap(MAPS[0])
    config = CollectivesConfig(all_reduce="hybrid", deterministic=True, chunk_mb=0.05, timeout_seconds=60)
    hybrid = HybridAllReduce(store(), dist.new_group(list(range(SIZE))), config, device, nodes)
    for dtype in (torch.float32, torch.bfloat16):
        parts = inputs(30_001 * SIZE, dtype)
        expected = ordered_sum(parts, nodes, dtype)
        late = (parts[rank].to(device) + busy(device)).to(dtype)
        own = torch.zeros(30_001, dtype=dtype, device=device)
        works = [hybrid.reduce_scatter(own, late)]
        works.append(hybrid.all_reduce(late))
        for work in works:
            work.wait()
        doubled = late * 2  # queued after the wait
        assert torch.equal(late.cpu(), expected), f"all_reduce {dtype}"
        assert torch.equal(doubled.cpu(), expected * 2), f"read after wait {dtype}"
        assert torch.equal(own.cpu(), expected.view(SIZE, -1)[rank]), f"reduce_scatter {dtype}"
        gathered = torch.empty_like(late)
        hybrid.all_gather(gathered, own).wait()
        assert torch.equal(gathered.cpu(), expected), f"all_gather {dtype}"
        average = parts[rank].to(device)
        hybrid.all_reduce(average, average=True).wait()
        assert torch.equal(average.cpu(), expected / SIZE), f"average {dtype}"
        say(rank, f"{dtype} tensors")
    hybrid.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
