"""Run on 3 ranks: batches whose sequences lie unevenly, balanced and brought back."""

from __future__ import annotations

import itertools
import json

import torch
import torch.distributed as dist

from megatron_rl.batch import Batch
from megatron_rl.workers.balance import balance

LENGTHS = [[9, 2, 3, 4, 8, 2, 5, 6], [], [4, 4]]  # by rank


def batch_of(rank: int) -> Batch:
    rows = [[100 * rank + 10 * i + t for t in range(length)] for i, length in enumerate(LENGTHS[rank])]
    batch = Batch.from_sequences(rows, [[int(t > 0) for t in range(len(row))] for row in rows])
    batch.sequences["owner"] = torch.tensor([1000 * rank + i for i in range(len(rows))], dtype=torch.int64)
    batch.temperature = 0.7
    return batch


def main() -> None:
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    batch = batch_of(rank)
    pairs = [i // 2 for i in range(batch.num_sequences)]
    found = {"rank": rank}
    for name, units, by_tokens in (("alone", None, True), ("pairs", pairs, True), ("rows", None, False)):
        balanced = balance(batch, group, units, by_tokens)
        doubled = balanced.give_back(balanced.batch["input_ids"].float() * 2, batch)
        starts = balanced.batch.cu_seqlens.tolist()
        found[name] = {
            "rows": [balanced.batch["input_ids"][a:b].tolist() for a, b in itertools.pairwise(starts)],
            "mask": balanced.batch["response_mask"].int().tolist(),
            "owners": balanced.batch["owner"].tolist(),
            "units": balanced.units,
            "temperature": balanced.batch.temperature,
            "came_back": torch.equal(doubled, batch["input_ids"].float() * 2),
        }
    even = Batch.from_sequences([[rank] * 5] * 4, [[1] * 5] * 4)
    found["untouched"] = balance(even, group).batch is even
    everything = [None] * 3
    dist.all_gather_object(everything, found)
    if rank == 0:
        print("RESULT " + json.dumps(everything), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
