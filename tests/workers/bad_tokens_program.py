"""Two ranks: what an actor says of token ids it has no row for, and how it seeds rows that a batch holds repeatedly.

Usage: bad_tokens_program.py MODEL. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl.batch import Batch, Prompt
from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers import Actor

INDICES = [0, 1, 0, 1, 0, 1, 2, 0]  # of the prompts of a global batch


def refused(actor: Actor, rows: list[list[int]]) -> list[str]:
    """The error of every rank."""
    batch = Batch.from_sequences(rows, [[0] + [1] * (len(row) - 1) for row in rows])
    error = "none"
    try:
        actor.logprobs().run(batch)
    except ConfigError as found:
        error = str(found)
    return actor.context.gather_objects(error)


def main(model: str) -> None:
    current_platform().init_process_group(timeout=120)
    rank, found = torch.distributed.get_rank(), {}
    for name, sizes in {"tp2": ParallelSizes(tp=2), "dp2": ParallelSizes()}.items():
        actor = Actor(model, AutoTokenizer.from_pretrained(model), parallel=sizes)
        both = name == "tp2"
        found[f"{name} above"] = refused(actor, [[1, 5, 16 if both or rank == 1 else 6]])
        found[f"{name} below"] = refused(actor, [[1, 5, -3 if both or rank == 0 else 6]])
        found[f"{name} fine"] = refused(actor, [[1, 5, 15]])
        share = INDICES if both else INDICES[4 * rank : 4 * rank + 4]
        prompts = [Prompt([1, 5 + index], index=index) for index in share]
        parts = actor.context.gather_objects([actor.rollouts.seeds.training(prompts) for _ in range(2)])
        own = parts[:1] if both else parts
        found[f"{name} seeds"] = [[seed for part in own for seed in part[step]] for step in (0, 1)]
        batch = Batch(prompts=prompts)
        actor.sample(n=2, max_tokens=4, parts=1 if both else 2).run(batch)
        answers = actor.context.gather_objects([sample.response_ids for sample in batch.samples])
        found[f"{name} answers"] = answers[0] if both else answers[0] + answers[1]
        ParallelContext.forget()
    if rank == 0:
        print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
