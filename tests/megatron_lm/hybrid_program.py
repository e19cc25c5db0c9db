"""Test program of several ranks: `job_program.py` with jobs whose chunks are Megatron-Core's `HybridModel`.

The case "refusals" writes FOLDER/refusals.json: what is said of models that cannot be taken over, and what of rotary
positions is. "resumed CASE" takes two steps of a case, saves and takes a third; a new job restores and takes the third
again: it must be the same, bit for bit. Usage: hybrid_program.py FOLDER CASE [CASE ...]
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import job_program
import torch
from hybrid_job import hybrid_provider, stack_spec
from job import JobArguments, get_model, initialize, transformer_config
from job_program import CASES, EXPERTS, PLAIN, SHARDED, TIED, TP2, TP2PP2, VPP2, Tokenizer
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel

from megatron_rl.algorithms import GRPO
from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.engines.megatron.adopted_architecture import architecture_of_chunk
from megatron_rl.parallel import ParallelContext
from megatron_rl.run.doctor.random_data import sampled_batch
from megatron_rl.trainer.checkpoint import DistributedCheckpoints
from megatron_rl.workers import Actor

FOUR, EXPERTS_FP32 = "*-*-*-*-", replace(EXPERTS, bf16=False)
ADAPTED = replace(PLAIN, lr=0.1)
PP2 = {"pipeline_model_parallel_size": 2}


def hybrid(args: JobArguments, pattern: str, **more: Any) -> JobArguments:
    return replace(args, hybrid_layer_pattern=pattern, **more)


CASES |= {
    "tied_fp32": TIED,
    "experts_fp32": EXPERTS_FP32,
    "hybrid": hybrid(PLAIN, FOUR),
    "hybrid_tied": hybrid(TIED, FOUR),
    "hybrid_experts": hybrid(EXPERTS_FP32, "*E*E*E*E"),
    "hybrid_tp2": hybrid(PLAIN, FOUR, **TP2, sequence_parallel=True),
    "hybrid_pp2": hybrid(PLAIN, "*-*-|*-*-", **PP2, **SHARDED),
    "hybrid_pp2vpp2": hybrid(PLAIN, "*-|*-|*-|*-", **VPP2),
    "hybrid_tp2pp2": hybrid(TIED, FOUR, **TP2PP2, **SHARDED),  # split without "|", which Megatron-Core still takes
    "lora": ADAPTED,
    "lora_hybrid": hybrid(ADAPTED, FOUR),
    "lora_hybrid_pp2": hybrid(ADAPTED, "*-*-|*-*-", **PP2),
    "lora_experts": replace(EXPERTS_FP32, lr=0.1),
    "lora_hybrid_experts": hybrid(EXPERTS_FP32, "*E*E*E*E", lr=0.1),
    "hybrid_experts_pp2ep2": hybrid(EXPERTS_FP32, "*E*E|*E*E", **PP2, expert_model_parallel_size=2, **SHARDED),
}


def chunk_of(pattern: str, **arguments: Any) -> Any:
    """A chunk of a whole model in one process."""
    args = hybrid(PLAIN, pattern)
    config = transformer_config(args)
    if not arguments:
        return get_model(args, config, hybrid_provider(args, config))[0]
    spec = stack_spec(config, own_layers=False)
    return HybridModel(config, spec, vocab_size=128, max_sequence_length=64, hybrid_layer_pattern=pattern, **arguments)


def refusals(folder: Path) -> None:
    """What `Actor` says to each of them."""
    predicting = chunk_of("*-*-")
    predicting.hybrid_layer_pattern = "*-*-/*-"  # as one that was built with Megatron-Core's layers for it
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "mamba": (chunk_of("M*-"), {}),
        "latent attention": (chunk_of("+-"), {}),
        "attention only": (chunk_of("***-"), {}),
        "a stage that parts a pair": (chunk_of("*|-*-"), {}),
        "multi-token prediction": (predicting, {}),
        "no positions": (chunk_of("*-*-", position_embedding_type="none"), {}),
    }
    said = {}
    for name, (chunk, config) in cases.items():
        try:
            Actor([chunk], Tokenizer(), None, parallel_state, config=config)
        except ConfigError as error:
            said[name] = str(error)
    options = {"rotary_base": 500000, "rotary_percent": 0.5, "seq_len_interpolation_factor": 4.0}
    rotary = architecture_of_chunk(chunk_of("*-*-", position_embedding_type="rope", **options), 96)
    scaling = dict(rotary.rope_scaling)
    found = [rotary.rope_theta, rotary.rotary_fraction, scaling["rope_type"], scaling["factor"]]
    (folder / "refusals.json").write_text(json.dumps(said | {"rotary": found}))


def resumed(case: str, folder: Path) -> None:
    """The third step of a run that was restored is that of the run that was saved."""
    loop = SimpleNamespace(step=2, state_dict=dict, load_state_dict=lambda state: None)
    initialize(CASES[case])
    first = job_program.actor_of(case, folder)
    step(first)
    step(first)
    saved = DistributedCheckpoints(folder / f"resumed_{case}", first.context, {"actor": first}, {})
    saved.save(loop)
    step(first)
    second = job_program.actor_of(case, folder)
    assert DistributedCheckpoints(saved.folder, second.context, {"actor": second}, {}).restore(loop)
    before = {name: tensor.clone() for name, tensor in second.engine.tensors().items()}
    step(second)
    found = second.engine.tensors()
    assert first.engine.optimizer is not None
    assert any(not torch.equal(found[name], tensor) for name, tensor in before.items())
    for name, expected in first.engine.tensors().items():
        assert torch.equal(found[name], expected), f"{case}: {name} differs by {(found[name] - expected).abs().max()}"
    ParallelContext.forget()
    print(f"RESUMED {case}", flush=True)


def step(actor: Actor) -> None:
    GRPO(actor).update()(sampled_batch(actor.context))


def main(folder: Path, cases: list[str]) -> None:
    steps = [case for case in cases if case in CASES]
    current_platform().init_process_group(timeout=120)
    for case in steps:
        initialize(CASES[case])
        job_program.run_case(case, folder)
        ParallelContext.forget()
    for case in cases:
        if case.startswith("resumed "):
            resumed(case.removeprefix("resumed "), folder)
    if "refusals" in cases:
        initialize(PLAIN)
        refusals(folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
