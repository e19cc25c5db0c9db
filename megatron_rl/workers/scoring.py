"""Forward-only passes as stages: one number for every token of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage
from megatron_rl.workers.balance import balance
from megatron_rl.workers.heads import collect_token_values
from megatron_rl.workers.megatron_model import MegatronModel
from megatron_rl.workers.schedule import Head, MicroBatching, plan_micro_batches, run_schedule

MakeHead = Callable[[MegatronModel, Batch, float], Head]


@dataclass
class ScoringModel:
    """A model and how batches are cut for it; `TrainableModel` adds what trains it."""

    model: MegatronModel
    micro_batching: MicroBatching


@torch.no_grad()
def token_values(worker: ScoringModel, batch: Batch, make_head: MakeHead) -> torch.Tensor:
    """Run ``make_head``'s head over the whole batch; ``[num_tokens]`` fp32 on the CPU, on every rank of the replica."""
    names = ("input_ids", "response_mask")
    scored = Batch(
        cu_seqlens=batch.cu_seqlens,
        tokens={name: batch.tokens[name] for name in names if name in batch.tokens},
        temperature=batch.temperature,
    )
    balanced = balance(scored, worker.model.context.dp_group, by_tokens=worker.micro_batching.packing)
    micro_batches = plan_micro_batches(balanced.batch, worker.model, worker.micro_batching)
    for chunk in worker.model.chunks:
        chunk.eval()
    head = make_head(worker.model, balanced.batch, batch.temperature)
    results = run_schedule(worker.model, balanced.batch, micro_batches, head, backward=False)
    values = collect_token_values(worker.model, balanced.batch, micro_batches, results)
    return balanced.give_back(values, scored)


def token_values_stage(name: str, worker: ScoringModel, make_head: MakeHead, write: str) -> Stage:
    """A stage that writes `token_values` to the token field ``write``."""

    def run(batch: Batch) -> None:
        batch.tokens[write] = token_values(worker, batch, make_head)

    at = worker.model.context
    return Stage(name, run, reads=("input_ids",), writes=(write,), place=str(at.sizes), agreement=at.agreement)
