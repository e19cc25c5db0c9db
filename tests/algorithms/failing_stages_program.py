"""Test program on 2 data-parallel ranks: rank 1 fails in one stage of an update, of every algorithm.

Prints ``CASE algorithm|stage|how|what rank 0 saw|what rank 1 saw`` for each stage that checks or runs on its own.
"""

from __future__ import annotations

import dataclasses

import torch
from chat_tokenizer import chat_tokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)

from layout_program import LABELLED, ONLINE, PAIRED, fixed_batch, sampled_batch  # isort: skip
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rl.algorithms import ALGORITHMS
from megatron_rl.batch import Batch
from megatron_rl.dataflow import Flow, Stage
from megatron_rl.devices import current_platform
from megatron_rl.workers import Actor, Critic, Reference


def failing(stage: Stage, rank: int) -> Stage:
    """``stage``, whose own part fails on rank 1."""
    inner = stage.check if stage.collective else stage.run

    def fail(batch: Batch) -> None:
        if rank == 1:
            raise ArithmeticError("made to fail")
        assert inner is not None
        inner(batch)

    return dataclasses.replace(stage, **{"check" if stage.collective else "run": fail})


def spoiling(stage: Stage, rank: int, field: str) -> Stage:
    """``stage``, after which ``field`` is NaN somewhere on rank 1."""

    def run(batch: Batch) -> None:
        stage.run(batch)
        if rank == 1:
            batch[field][-1] = float("nan")

    return dataclasses.replace(stage, run=run)


def outcome(flow: Flow, batch: Batch) -> str:
    try:
        flow(batch)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def say(context, *what: str) -> None:
    """The last of ``what`` is this rank's own."""
    own = context.gather_objects(what[-1])
    if context.rank == 0:
        print("CASE " + "|".join((*what[:-1], *own)), flush=True)


def main() -> None:
    current_platform().init_process_group(timeout=60)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    actor = Actor(model, chat_tokenizer())
    reference, critic, rank = Reference(actor), Critic(model, context=actor.context), actor.context.rank
    for name, config in (ONLINE | PAIRED | LABELLED | {"sft": {}}).items():
        if name.split()[0] != name:
            continue
        kind = ALGORITHMS[name]
        algorithm = kind(critic, **config) if name == "reward-model" else kind(actor, reference, critic, config)
        flow, make = algorithm.update(), sampled_batch if name in ONLINE else fixed_batch
        for place, stage in enumerate(flow.stages):
            if stage.collective and stage.check is None:
                continue
            stages = (*flow.stages[:place], failing(stage, rank), *flow.stages[place + 1 :])
            say(actor.context, name, stage.name, "raises", outcome(Flow(stages), make(actor.context)))
        for place, stage in enumerate(flow.stages[:-1]):
            if "advantages" in stage.writes:
                stages = (*flow.stages[:place], spoiling(stage, rank, "advantages"), *flow.stages[place + 1 :])
                say(actor.context, name, stage.name, "NaN advantage", outcome(Flow(stages), make(actor.context)))
    batch = sampled_batch(actor.context)
    if rank == 1:
        batch.samples[0].reward = float("nan")
    say(actor.context, "grpo", "grpo.prepare", "NaN reward", outcome(ALGORITHMS["grpo"](actor).update(), batch))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
