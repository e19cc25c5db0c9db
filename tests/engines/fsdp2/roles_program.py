"""Adapters, value models, checkpoints and rollouts of FSDP2 engines; run on one rank, which stores what it found in
FOLDER, then on two, which compare. Sizes do not divide by two.

    roles_program.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from engines.fsdp2.steps import Tokenizer, grpo_step, part
from engines.fsdp2.tiny_models import SIZES, TOKENS
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from megatron_rl.batch import Batch, Prompt
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.trainer.checkpoint import DistributedCheckpoints
from megatron_rl.workers import Actor, Critic
from megatron_rl.workers.loss import LossInputs, LossOutput

UNEVEN = SIZES | TOKENS | {"intermediate_size": 45, "vocab_size": 97}
ADAM = {"learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 3}
LORA = {"rank": 3, "alpha": 6.0, "target_modules": ["linear_qkv", "linear_fc2"]}


COMPARED = ("loss/total", "optimizer/gradient_norm", "optimizer/learning_rate")


class Trainer:
    step = 1

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        assert state == {}


def model(model_type: str = "olmo2") -> PreTrainedModel:
    torch.manual_seed(5)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, dtype="float32", **UNEVEN))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def actor(context: ParallelContext, source: object = None, **config: object) -> Actor:
    settings = {"optimizer": ADAM, "backend": "fsdp2"} | config
    return Actor(source or model(), Tokenizer(), context=context, config=settings)


def whole(engine: TrainingEngine) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.parameters().items():
        held = parameter.detach()
        found[name] = (held.full_tensor() if isinstance(held, DTensor) else held).clone()
    return found


def full_training(context: ParallelContext, folder: Path) -> dict[str, Tensor]:
    """Two steps of AdamW, and the same after a checkpoint, exactly."""
    first = actor(context)
    grpo_step(first)
    place = folder / f"checkpoints{context.world_size}"
    DistributedCheckpoints(place, context, {"actor": first}, {}).save(Trainer())
    expected = grpo_step(first)
    resumed = actor(context)
    assert DistributedCheckpoints(place, context, {"actor": resumed}, {}).restore(Trainer())
    assert resumed.engine.num_steps == 1
    metrics = grpo_step(resumed)
    assert all(metrics[key] == expected[key] for key in COMPARED), metrics
    found = whole(first.engine)
    for name, value in whole(resumed.engine).items():
        assert torch.equal(value, found[name]), name
    if context.world_size == 2:  # what one rank wrote
        other = actor(context)
        assert DistributedCheckpoints(folder / "checkpoints1", context, {"actor": other}, {}).restore(Trainer())
        metrics = grpo_step(other)
        assert abs(metrics["loss/total"] - expected["loss/total"]) < 1e-6
    return found


def adapters(context: ParallelContext, folder: Path) -> dict[str, Tensor]:
    """Frozen weights stay; what is exported and pushed is merged; PEFT's files hold the same update."""
    trained = actor(context, lora=LORA)
    before = whole(trained.engine)
    for _ in range(2):
        grpo_step(trained)
    found = whole(trained.engine)
    assert all(torch.equal(found[name], before[name]) == (".lora." not in name) for name in found)
    merged = trained.save_pretrained(folder / f"merged{context.world_size}")
    peft = trained.save_adapters(folder / f"adapters{context.world_size}")
    trained.generate([Prompt([1, 5, 6], index=0)], max_tokens=2)
    assert not trained.verify_weights().faults
    if context.rank == 0:
        settings = json.loads((peft / "adapter_config.json").read_text())
        assert settings["target_modules"] == ["down_proj", "k_proj", "q_proj", "v_proj"]
        factor, files = settings["lora_alpha"] / settings["r"], load_file(peft / "adapter_model.safetensors")
        exported, start = load_file(merged / "model.safetensors"), model().state_dict()
        for name, value in exported.items():
            key = "base_model.model." + name.removesuffix("weight")
            update = 0.0
            if f"{key}lora_A.weight" in files:
                update = factor * files[f"{key}lora_B.weight"] @ files[f"{key}lora_A.weight"]
                assert update.abs().max() > 0
            assert torch.allclose(value, start[name] + update, atol=1e-7), name
    place = folder / f"adapters_checkpoint{context.world_size}"
    described = trained.describe_into
    DistributedCheckpoints(place, context, {"actor": trained}, {}, describe=described).save(Trainer())
    started = actor(context, place / "step_000001")
    again = started.save_pretrained(folder / f"merged_again{context.world_size}")
    if context.rank == 0:
        files = load_file(again / "model.safetensors")
        assert all(torch.equal(value, files[name]) for name, value in load_file(merged / "model.safetensors").items())
    return {name: value for name, value in found.items() if ".lora." in name}


def imitation(inputs: LossInputs) -> LossOutput:
    return LossOutput(inputs.masked((inputs.values - 1.0).square()).sum() / inputs.totals.tokens)


def value_model(context: ParallelContext, folder: Path) -> dict[str, Tensor]:
    """A critic from a language model begins at zero, learns, and is exported as a classifier with the same values."""
    critic = Critic(model(), Tokenizer(), context=context, config={"optimizer": ADAM, "backend": "fsdp2"})
    assert critic.engine.origin.lacks_value_head
    rows = [[1, 5, 6, 7], [1, 5, 8], [1, 9, 10, 4, 4], [1, 3]]
    mine = part(rows, 1, critic.engine)
    given = Batch.from_sequences(mine, [[0] + [1] * (len(row) - 1) for row in mine])
    for _ in range(3):
        critic.optimize(given, imitation)
    exported = critic.save_pretrained(folder / f"critic{context.world_size}")
    again = Critic(exported, Tokenizer(), context=context, config={"backend": "fsdp2"})
    assert not again.engine.origin.lacks_value_head
    values = {}
    for worker in (critic, again):
        batch = Batch.from_sequences(rows, [[0] + [1] * (len(row) - 1) for row in rows])
        worker.values().run(batch)
        values[worker] = batch["values"]
    assert torch.equal(values[critic], values[again])
    if context.rank == 0:
        classifier = AutoModelForSequenceClassification.from_pretrained(exported).eval()
        assert classifier.num_labels == 1
        start = 0
        for row in rows:
            prefix = torch.tensor([row[:-1]])  # the value at a token is that of what stands before it
            expected = classifier(prefix).logits[0, 0]
            assert abs(float(values[critic][start + len(row) - 1] - expected)) < 1e-5
            start += len(row)
    return whole(critic.engine)


def shared_head(context: ParallelContext, folder: Path) -> dict[str, Tensor]:
    """A value head beside the output layer is trained with the policy, saved beside it and found again."""
    policy = actor(context, value_head=True)

    def loss(inputs: LossInputs) -> LossOutput:
        value = inputs.masked((inputs.values - 1.0).square() - inputs.logprobs)
        return LossOutput(value.sum() / inputs.totals.tokens)

    mine = part([[1, 5, 6, 7], [1, 5, 8], [1, 9, 10]], 1, policy.engine)
    policy.optimize(Batch.from_sequences(mine, [[0] + [1] * (len(row) - 1) for row in mine]), loss)
    saved = policy.save_pretrained(folder / f"shared{context.world_size}")
    again = whole(actor(context, saved, value_head=True).engine)
    found = whole(policy.engine)
    assert found["value_head.weight"].abs().max() > 0
    assert all(torch.equal(value, again[name]) for name, value in found.items())
    return found


def local_rollouts(context: ParallelContext, folder: Path) -> dict[str, Tensor]:
    """A llama has a family: the local engine gets its shards from FSDP2's, and answers as transformers does."""
    policy = actor(context, model("llama"), rollout={"engine": "local"})
    grpo_step(policy)
    (sample,) = policy.generate([Prompt([1, 5, 6], index=0)], max_tokens=6)
    assert type(policy.rollouts.engine).__name__ == "LocalEngine"
    assert not policy.verify_weights().faults
    saved = policy.save_pretrained(folder / f"llama{context.world_size}")
    if context.rank == 0:
        logits = AutoModelForCausalLM.from_pretrained(saved)(torch.tensor([[1, 5, 6, *sample.response_ids]])).logits
        assert logits[0, 2:-1].argmax(-1).tolist() == sample.response_ids
    return whole(policy.engine)


def half_precision(context: ParallelContext, folder: Path) -> dict[str, Tensor]:
    """Gathered in bf16, fp32 in between; the rollout engine holds what the forward pass computes with."""
    policy = actor(context, dtype="bfloat16", recompute=True)
    metrics = grpo_step(policy)
    assert 0 < metrics["optimizer/gradient_norm"] < 100
    policy.publish()
    held = policy.rollouts.engine.targets()
    for name, value in whole(policy.engine).items():
        assert value.dtype == torch.float32
        assert torch.equal(held[name], value.bfloat16()), name
    return {}


CASES: tuple[Callable[[ParallelContext, Path], dict[str, Tensor]], ...] = (
    full_training,
    adapters,
    value_model,
    shared_head,
    local_rollouts,
    half_precision,
)


def main() -> None:
    folder = Path(sys.argv[1])
    context = ParallelContext.create(ParallelSizes(), seed=1)
    for case in CASES:
        found, stored = case(context, folder), folder / f"{case.__name__}.pt"
        if context.world_size == 1:
            torch.save(found, stored)
        for name, value in torch.load(stored).items():
            # AdamW divides by the gradient's size: where that is all rounding, so is the step.
            assert (found[name] - value).abs().quantile(0.99) < 1e-5, (case.__name__, name)
        if context.rank == 0:
            print(f"{case.__name__} is right", flush=True)


if __name__ == "__main__":
    main()
