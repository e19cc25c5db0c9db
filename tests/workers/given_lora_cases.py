"""Test program of several ranks: a GRPO step that starts from adapters in a folder as PEFT writes it, on many layouts.

Usage: given_lora_cases.py MODEL FOLDER CASE [CASE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from layout_cases import own_share, samples
from lora_cases import logprobs_of, main, rollout_gap, source_of, whole_parameters
from peft_folders import write_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl.algorithms import GRPO
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.parallel import ParallelSizes
from megatron_rl.workers.actor import Actor

TP2EP2 = {"tp": 2, "ep": 2, "sequence_parallel": True}
CASES: dict[str, dict] = {
    "one_alone": {},
    "one_fsdp2": {"backend": "fsdp2"},
    "latent_alone": {},
    "shared_alone": {},
    "oss_alone": {},
    "one_tp2": {"tp": 2},
    "one_pp2vpp2": {"pp": 2, "vpp": 2},
    "one_fsdp2dp2": {"backend": "fsdp2"},
    "latent_pp2": {"pp": 2},
    "latent_ep2": {"ep": 2},
    "shared_tp2ep2": TP2EP2,
    "oss_tp2ep2": TP2EP2,
    "latent_tp2pp2ep2": TP2EP2 | {"pp": 2},
}


def run_case(model: str, folder: Path, name: str) -> dict:
    sizes, kind = dict(CASES[name]), name.partition("_")[0]
    source, own = source_of(name, model), folder / f"{kind} given"
    if not own.exists():
        base = source if source is not model else AutoModelForCausalLM.from_pretrained(model)
        base.save_pretrained(folder / f"{kind} base")
        write_folder(own, kind, base)
    sgd = OptimizerConfig(optimizer="sgd", learning_rate=1e-2, clip_gradient=0.0)
    backend = {"backend": sizes.pop("backend")} if "backend" in sizes else {}
    config = Actor.Config(optimizer=sgd, lora={"path": str(own)}, **backend)
    actor = Actor(source, AutoTokenizer.from_pretrained(model), parallel=ParallelSizes(**sizes), config=config)
    found: dict[str, Any] = {"logprobs": logprobs_of(actor, actor.logprobs("seen"), "seen")}
    actor.save_pretrained(folder / f"{name} merged")
    actor.save_adapters(folder / f"{name} first")
    context = actor.context
    batch = own_share(samples(), context.coordinates.dp, context.grid.dp)
    GRPO(actor, kl_coefficient=0.0, loss_aggregation="token-mean", old_logprobs="recompute").update()(batch)
    found["norm"] = batch.metrics["optimizer/gradient_norm"]
    if not backend:
        found["gradients"] = whole_parameters(actor, lambda parameter: parameter.main_grad)
        found["gap"] = rollout_gap(actor)
    actor.save_adapters(folder / f"{name} trained")
    return found


if __name__ == "__main__":
    main(run_case, sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
