"""GRPO and DPO steps, generation and export of many architectures under FSDP2; run on one rank, then on two.

    architecture_program.py FOLDER NAME...

One rank compares with `TorchEngine`, which calls the module as a user would, and stores what that gave in FOLDER; two
ranks compare with what is stored.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from engines.fsdp2.steps import STEPS, Tokenizer
from engines.fsdp2.tiny_models import PADDED, tiny_model
from engines.torch_engine import TorchEngine
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from megatron_rl.batch import Prompt
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers import Actor

SGD = OptimizerConfig(optimizer="sgd", learning_rate=0.05, clip_gradient=0.0)
TOLERANCE = 1e-5  # relative to the largest value of a tensor


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    context = ParallelContext.create(ParallelSizes(), seed=1)
    for name in names:
        folder.joinpath(name).mkdir(exist_ok=True)
        stored = folder / name / "steps.pt"
        if context.world_size == 1:
            torch.save(oracle(name, context), stored)
        packed, largest = compare(name, context, torch.load(stored))
        assert packed == (name not in PADDED), (name, packed)
        generate_and_export(name, context, folder / name / f"export{context.world_size}")
        if context.rank == 0:
            print(f"{name}: {'packed' if packed else 'padded'}, largest relative difference {largest:.1e}", flush=True)


def oracle(name: str, context: ParallelContext) -> dict[str, dict]:
    found = {}
    for step, run in STEPS.items():
        actor = Actor(TorchEngine(tiny_model(name, dropout=False), context, SGD), Tokenizer())
        found[step] = {"metrics": run(actor), "gradients": gradients(actor.engine)}
    return found


def compare(name: str, context: ParallelContext, stored: dict[str, dict]) -> tuple[bool, float]:
    """Take the same steps under FSDP2; returns whether it packs, and the largest difference of a gradient."""
    largest, packed = 0.0, False
    for step, run in STEPS.items():
        actor = Actor(tiny_model(name), Tokenizer(), context=context, config={"optimizer": SGD, "dtype": "float32"})
        assert type(actor.engine).__name__ == "FSDP2Engine"
        metrics, packed = run(actor), actor.engine.packs
        expected = stored[step]
        for key in ("loss/total", "optimizer/gradient_norm"):
            given, wanted = metrics[key], expected["metrics"][key]
            assert abs(given - wanted) <= TOLERANCE * max(abs(wanted), 1e-2), (name, step, key, given, wanted)
        found = gradients(actor.engine)
        assert found.keys() == expected["gradients"].keys(), (name, found.keys() ^ expected["gradients"].keys())
        scale = max(float(value.abs().max()) for value in found.values())
        for key, value in expected["gradients"].items():
            difference = float((found[key] - value).abs().max()) / max(float(value.abs().max()), 1e-3 * scale)
            assert difference <= TOLERANCE, (name, step, key, difference)
            largest = max(largest, difference)
    return packed, largest


def gradients(engine: TrainingEngine) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.parameters().items():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    return found


def generate_and_export(name: str, context: ParallelContext, folder: Path) -> None:
    """A step, then greedy answers of the pushed weights; the exported folder must give the same, by transformers."""
    actor = Actor(tiny_model(name), Tokenizer(), context=context, config={"optimizer": SGD, "dtype": "float32"})
    STEPS["dpo"](actor)
    prompts = [Prompt([1, 5, 6], index=0), Prompt([1, 7], index=1), Prompt([4, 9, 3], index=2)]
    samples = actor.generate(prompts, max_tokens=6)
    check = actor.verify_weights()
    assert check.compared == context.world_size, check
    assert not check.faults, check
    actor.save_pretrained(folder)
    if context.rank == 0:
        exported = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(exported) is type(tiny_model(name))
        for sample in samples:
            ids = torch.tensor([[*sample.prompt.token_ids, *sample.response_ids]])
            with torch.no_grad():
                logprobs = exported(ids).logits[0, :-1].float().log_softmax(-1)
            answer = logprobs[len(sample.prompt.token_ids) - 1 :]
            assert answer.argmax(-1).tolist() == sample.response_ids, (name, sample.response_ids)
            drawn = answer.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
            assert torch.allclose(drawn, torch.tensor(sample.rollout_logprobs), atol=1e-5), name
    gathered = {n: p.full_tensor() for n, p in actor.engine.parameters().items() if isinstance(p, DTensor)}
    if context.rank == 0:
        for key, value in exported.named_parameters():
            assert torch.equal(value, gathered[key]), (name, key)
    actor.close()


if __name__ == "__main__":
    main()
