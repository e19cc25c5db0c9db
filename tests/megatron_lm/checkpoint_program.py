"""Test program of several ranks: checkpoints of runs whose optimizer the job has brought.

Each case takes two steps, saves, takes a third; a new job restores and takes the third again: it must be the same, bit
for bit. Usage: checkpoint_program.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import megatron_rl  # noqa: F401  (first: the CPU face)

from job import JobArguments, build, float16, get_model, initialize, local_provider, transformer_config  # isort: skip
from megatron.core import parallel_state  # isort: skip
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from megatron_rl.algorithms import GRPO
from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.run.doctor.random_data import NumberTokenizer, sampled_batch
from megatron_rl.trainer.checkpoint import DistributedCheckpoints
from megatron_rl.workers import Actor

SMALL = JobArguments(num_layers=1)
HALF = {"bf16": replace(SMALL, bf16=True), "fp16": replace(SMALL, fp16=True, initial_loss_scale=2.0**12)}
Made = Callable[[list[torch.nn.Parameter]], Optimizer]
CASES: dict[str, tuple[JobArguments, Made | None]] = {
    "megatron_fp16": (HALF["fp16"], None),
    "megatron_bf16_sharded": (replace(HALF["bf16"], use_distributed_optimizer=True), None),
    "adam": (SMALL, lambda parameters: Adam(parameters, lr=0.01)),
    "adamw_bf16": (HALF["bf16"], lambda parameters: AdamW(parameters, lr=0.01)),
    "amsgrad": (SMALL, lambda parameters: Adam(parameters, lr=0.01, amsgrad=True)),
    "sgd": (SMALL, lambda parameters: SGD(parameters, lr=0.1)),
    "megatron_sgd_bf16": (replace(HALF["bf16"], optimizer="sgd", lr=0.1), None),
    "momentum": (SMALL, lambda parameters: SGD(parameters, lr=0.1, momentum=0.9)),
    "momentum_bf16": (HALF["bf16"], lambda parameters: SGD(parameters, lr=0.1, momentum=0.9)),
    "nadam": (SMALL, lambda parameters: NAdam(parameters, lr=0.01)),
    "two_groups": (
        SMALL,
        lambda parameters: Adam([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}], lr=0.01),
    ),
}
STORABLE = [case for case in CASES if case != "nadam"]


def actor_of(case: str, seed: int) -> Actor:
    args, make = CASES[case]
    torch.manual_seed(seed)
    if make is None:
        job = build(args)
        return Actor(job.model, NumberTokenizer(), job.optimizer, parallel_state, scheduler=job.opt_param_scheduler)
    config = transformer_config(args)
    chunks = float16(args, config, get_model(args, config, local_provider(args, config)))
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return Actor(chunks, NumberTokenizer(), make(parameters), parallel_state)


def step(actor: Actor) -> None:
    GRPO(actor).update()(sampled_batch(actor.context))


def checkpoints(actor: Actor, folder: Path) -> DistributedCheckpoints:
    return DistributedCheckpoints(folder, actor.context, {"actor": actor}, {})


def run_case(case: str, folder: Path) -> None:
    loop = SimpleNamespace(step=2, state_dict=dict, load_state_dict=lambda state: None)
    first = actor_of(case, seed=5)
    step(first)
    step(first)
    checkpoints(first, folder).save(loop)
    step(first)
    second = actor_of(case, seed=6)
    assert checkpoints(second, folder).restore(loop)
    step(second)
    for (name, expected), found in zip(first.engine.tensors().items(), second.engine.tensors().values(), strict=True):
        assert torch.equal(found, expected), f"{case}: {name} differs by {(found - expected).abs().max()}"
    rates = [[group["lr"] for group in actor.engine.optimizer.param_groups] for actor in (first, second)]
    assert rates[0] == rates[1], rates
    print(f"RESULT {case}", flush=True)


def main(folder: Path) -> None:
    current_platform().init_process_group(timeout=120)
    initialize(SMALL)
    for case in STORABLE:
        run_case(case, folder / case)
    what_cannot_be_stored(folder / "none")
    dist.destroy_process_group()


def what_cannot_be_stored(folder: Path) -> None:
    """Is said by name."""
    actor = actor_of("nadam", seed=5)
    step(actor)
    with pytest.raises(
        ConfigError, match="the optimizer NAdam keeps 'mu_product', which does not have its parameter's shape"
    ):
        checkpoints(actor, folder).save(SimpleNamespace(step=1, state_dict=dict))
    print("RESULT nadam refused", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
