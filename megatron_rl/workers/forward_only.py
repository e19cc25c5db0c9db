"""Forward-only passes: one number for every token of the batch, a log-probability or a value."""

from __future__ import annotations

import torch

from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.engines.micro_batches import plan_micro_batches
from megatron_rl.workers.balance import balance
from megatron_rl.workers.outputs import MakeOutput, collect_token_values


def forward_only(engine: TrainingEngine, batch: Batch, make_output: MakeOutput) -> torch.Tensor:
    """Run the whole batch forward and collect what ``make_output``'s output gives for each position; ``[num_tokens]``
    fp32 on the CPU, on every rank of the replica. Collective."""
    names = ("input_ids", "response_mask")
    inputs = Batch(
        cu_seqlens=batch.cu_seqlens,
        tokens={name: batch.tokens[name] for name in names if name in batch.tokens},
        temperature=batch.temperature,
    )
    balanced = balance(inputs, engine.context.dp_group, by_tokens=engine.micro_batching.packing)
    micro_batches = plan_micro_batches(balanced.batch, engine)
    output = make_output(engine, balanced.batch, batch.temperature)
    results = engine.forward(balanced.batch, micro_batches, output)
    values = collect_token_values(engine, balanced.batch, micro_batches, results)
    return balanced.give_back(values, inputs)


def forward_only_stage(name: str, engine: TrainingEngine, make_output: MakeOutput, write: str) -> Stage:
    """A stage that writes the result of `forward_only` to the token field ``write``."""

    def run(batch: Batch) -> None:
        batch.tokens[write] = forward_only(engine, batch, make_output)

    at = engine.context
    return Stage(name, run, reads=("input_ids",), writes=(write,), place=str(at.sizes), agreement=at.agreement)
