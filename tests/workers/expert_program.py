"""Test program of several ranks: a GRPO and a DPO step of a mixture of experts on many layouts.

Each case takes one step of plain gradient descent from the same weights for each algorithm, writes the weights that it
leads to into FOLDER/<case> <algorithm>, and prints loss and gradient norm as a JSON line.
Usage: expert_program.py FOLDER CASE [CASE ...]; FOLDER holds the models "actor" and "reference".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import megatron_rl  # noqa: F401  (first: the CPU face)

from megatron_rl.algorithms import DPO, GRPO  # isort: skip
from megatron_rl.devices import current_platform
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.engines.megatron.model.model_chunk import chunk_tensors, naming_of
from megatron_rl.models import megatron_layout
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.run.doctor.random_data import NumberTokenizer, fixed_batch, sampled_batch
from megatron_rl.weights.hf_in import load_folder, read_architecture
from megatron_rl.workers import Actor, Reference

LEARNING_RATE = 1.0  # so that the change of the weights is the gradient
SMALL = {"token_budget": 40}
TP2 = {"tp": 2, "sequence_parallel": True}
CASES: dict[str, tuple[dict, dict]] = {
    "one": ({}, {}),
    "dp2": ({}, {}),
    "ep2": ({"ep": 2}, {}),
    "ep2_small_micro_batches": ({"ep": 2}, SMALL),
    "ep2_padded": ({"ep": 2}, {"packing": False, "micro_batch_size": 4}),
    "ep2_recompute": ({"ep": 2}, {"recompute": True}),
    "cp2ep2": ({"cp": 2, "ep": 2}, {}),
    "tp2": (TP2, {}),  # whole experts on both tensor-parallel ranks
    "tp2ep2": ({"ep": 2, **TP2}, {}),
    "dp4ep2": ({"ep": 2}, {}),
    "ep4": ({"ep": 4}, SMALL),
    "tp2ep2dp2": ({"ep": 2, **TP2}, {}),
    "pp2ep2": ({"pp": 2, "ep": 2}, SMALL),
    "cp2ep2dp2": ({"cp": 2, "ep": 2}, {}),
    "pp2vpp2ep2": ({"pp": 2, "vpp": 2, "ep": 2}, {}),
}


AUXILIARY = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
OWN: dict[str, dict] = {  # models that a Megatron job brings, with losses of their routers
    "own": {},
    "own_auxiliary": {**AUXILIARY, "calculate_per_token_loss": False},
    "own_auxiliary_per_token": AUXILIARY,
}
CASES |= {name: ({}, SMALL) for name in OWN}


def own_chunks(folder: Path, context: ParallelContext, overrides: dict) -> Any:
    architecture = read_architecture(folder)
    config = transformer_config(architecture, context.sizes, **overrides)
    chunks = build_model(architecture, config, pg_collection=context.collection)
    vocab = padded_vocab(architecture.vocab, context.sizes.tp)
    layout = megatron_layout(architecture, context.grid, vocab, naming_of(chunks))
    load_folder(folder, layout, context.rank, chunk_tensors(chunks))
    return chunks


def run_case(folder: Path, case: str, algorithm: str) -> dict[str, float]:
    sizes, overrides = CASES[case]
    sgd = OptimizerConfig(optimizer="sgd", learning_rate=LEARNING_RATE, clip_gradient=0.0)
    context = ParallelContext.create(ParallelSizes(**sizes), timeout=120, seed=0)
    config = Actor.Config(optimizer=sgd, **overrides)
    model = own_chunks(folder / "actor", context, OWN[case]) if case in OWN else str(folder / "actor")
    actor = Actor(model, NumberTokenizer(), context=context, config=config)
    reference = Reference(str(folder / "reference"), NumberTokenizer(), context=context, config=config)
    has_auxiliary = actor.engine.config.moe_router_load_balancing_type != "none"
    assert has_auxiliary == ("auxiliary" in case)
    if algorithm == "grpo":
        batch = sampled_batch(context)
        GRPO(actor, reference, kl_coefficient=0.05, loss_aggregation="token-mean").update()(batch)
    else:
        batch = fixed_batch(context)
        DPO(actor, reference, loss={"sigmoid": 1.0, "sft": 0.3}).update()(batch)
    actor.save_pretrained(folder / f"{case} {algorithm}")
    return {name: value for name, value in batch.metrics.items() if not name.startswith("time/")}


def main(folder: Path, cases: list[str]) -> None:
    current_platform().init_process_group(timeout=120)
    for case in cases:
        for algorithm in ("grpo", "dpo"):
            metrics = run_case(folder, case, algorithm)
            if torch.distributed.get_rank() == 0:
                print("RESULT " + json.dumps([case, algorithm, metrics]), flush=True)
        ParallelContext.forget()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
