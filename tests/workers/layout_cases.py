"""Test program of several ranks: one GRPO step on many layouts, printed as JSON lines for the test to compare.

Each case builds the model in its layout, computes log-probabilities of and optimises one fixed batch, and
reports log-probabilities, loss, gradient norm and the change of weights. Usage: layout_cases.py MODEL CASE [CASE ...]
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl.algorithms import GRPO
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.devices import current_platform
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers.actor import Actor
from megatron_rl.workers.reference import Reference

CASES: dict[str, tuple[dict, dict]] = {
    "one": ({}, {}),
    "one_padded": ({}, {"packing": False, "micro_batch_size": 3}),
    "one_small_budget": ({}, {"token_budget": 48}),
    "one_empty_rows": ({}, {"packing": False, "micro_batch_size": 4}),
    "tp2": ({"tp": 2}, {}),
    "pp2": ({"pp": 2}, {}),
    "dp2": ({}, {}),
    "cp2": ({"cp": 2}, {}),
    "cp2_padded": ({"cp": 2}, {"packing": False, "micro_batch_size": 2}),
    "tp2_sp": ({"tp": 2, "sequence_parallel": True}, {}),
    "tp2_padded": ({"tp": 2}, {"packing": False, "micro_batch_size": 4}),
    "tp2pp2": ({"tp": 2, "pp": 2}, {}),
    "pp2vpp2": ({"pp": 2, "vpp": 2}, {}),
    "pp2vpp2_small_budget": ({"pp": 2, "vpp": 2}, {"token_budget": 64}),
    "tp2cp2": ({"tp": 2, "cp": 2}, {}),
    "dp2pp2": ({"pp": 2}, {"token_budget": 48}),
    "dp4": ({}, {}),
    "tp2_recompute": ({"tp": 2}, {"recompute": True}),
}
VOCAB = 512


def samples() -> list[Sample]:
    """12 samples of 4 prompts with unequal lengths, fixed by a seed."""
    generator = torch.Generator().manual_seed(11)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    made = []
    for group in range(4):
        prompt = Prompt(tokens(3 + group), index=group)
        for _ in range(3):
            length = int(torch.randint(1, 14, (1,), generator=generator))
            logprobs = (-3 - torch.rand(length, generator=generator)).tolist()
            reward = float(torch.rand((), generator=generator))
            made.append(Sample(prompt, tokens(length), logprobs, group=group, reward=reward))
    return made


def own_share(rows: list[Sample], dp_rank: int, dp: int) -> Batch:
    size = len(rows) // dp
    mine = rows[dp_rank * size : (dp_rank + 1) * size]
    batch = Batch(samples=mine, temperature=0.8)
    batch.sequences["rewards"] = torch.tensor([s.reward for s in mine])
    return batch


def run_case(model: str, name: str) -> dict:
    sizes, overrides = CASES[name]
    sgd = OptimizerConfig(optimizer="sgd", learning_rate=1e-3, clip_gradient=0.0)
    actor = Actor(
        model,
        AutoTokenizer.from_pretrained(model),
        parallel=ParallelSizes(**sizes),
        config=Actor.Config(optimizer=sgd, **overrides),
    )
    reference = Reference(actor)
    grpo = GRPO(
        actor,
        reference,
        kl_coefficient=0.05,
        entropy_coefficient=0.01,
        loss_aggregation="token-mean",
        num_mini_batches=2,
        old_logprobs="recompute",
    )
    context = actor.context
    rows = samples()
    batch = own_share(rows, context.coordinates.dp, context.grid.dp)
    flow = actor.logprobs("seen")
    packed = own_share(rows, context.coordinates.dp, context.grid.dp)
    grpo.pack_stage().run(packed)
    flow.run(packed)
    grpo.update()(batch)
    logprobs = context.gather_objects((context.coordinates.dp, packed["seen"].tolist()))
    by_replica = dict(logprobs)
    metrics = {k: v for k, v in batch.metrics.items() if not k.startswith("time/")}
    return {
        "case": name,
        "logprobs": [value for dp in sorted(by_replica) for value in by_replica[dp]],
        "metrics": metrics,
    }


def main() -> None:
    current_platform().init_process_group(timeout=120)
    for name in sys.argv[2:]:
        result = run_case(sys.argv[1], name)
        ParallelContext.forget()
        if torch.distributed.get_rank() == 0:
            print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
