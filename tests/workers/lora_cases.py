"""Test program of several ranks: a GRPO step of a policy with adapters on many layouts, saved for a test to compare.

Cases are named after their model: one of `MODELS`, or a llama. Each case sets every adapter's B to values that do not
depend on the layout, so that A has a gradient; then scores, optimises, publishes, samples and exports.
Usage: lora_cases.py MODEL FOLDER CASE [CASE ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import two_layers
from layout_cases import own_share, samples
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl.algorithms import GRPO
from megatron_rl.batch import Batch, Prompt
from megatron_rl.devices import current_platform
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.engines.megatron.model.lora_adapter import LoraAdapter
from megatron_rl.models import Architecture, Experts
from megatron_rl.models.hf_config import hf_config_from
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers.actor import Actor
from megatron_rl.workers.reference import Reference

LORA = {"rank": 4, "alpha": 6.0}
ATTENTION = LORA | {"target_modules": ("linear_qkv", "linear_proj")}
EXPERTS = Architecture(
    family="qwen3_moe", num_layers=2, hidden=32, ffn=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab=512, tied=False,
    qk_norm=True, experts=Experts(4, 2, 16),
)  # fmt: skip
LATENT_ATTENTION = LORA | {"target_modules": ("linear_q_proj", "linear_kv_up_proj", "linear_proj")}
MODELS = {
    "latent": "deepseek_v3",
    "moonlight": "deepseek_v3, moonlight",
    "shared": "qwen2_moe",
    "mixtral": "mixtral",
    "oss": "gpt_oss",
}
CASES: dict[str, tuple[dict, dict]] = {
    "one": ({}, {}),
    "one_recompute": ({}, {"recompute": True}),
    "one_two_targets": ({}, {"lora": {"rank": 4, "alpha": 6.0, "target_modules": ("linear_fc2", "linear_qkv")}}),
    "tp2": ({"tp": 2}, {}),
    "tp2_padded": ({"tp": 2}, {"packing": False, "micro_batch_size": 4}),
    "tp2_recompute": ({"tp": 2}, {"recompute": True}),
    "tp2_sp": ({"tp": 2, "sequence_parallel": True}, {}),
    "pp2": ({"pp": 2}, {}),
    "pp2vpp2": ({"pp": 2, "vpp": 2}, {}),
    "cp2": ({"cp": 2}, {}),
    "dp2": ({}, {}),
    "tp2pp2": ({"tp": 2, "pp": 2}, {}),
    "tp2sp_dp2": ({"tp": 2, "sequence_parallel": True}, {}),
    "experts_one": ({}, {"lora": ATTENTION}),
    "experts_ep2": ({"ep": 2}, {"lora": ATTENTION}),
    "experts_tp2sp_ep2": ({"tp": 2, "ep": 2, "sequence_parallel": True}, {"lora": ATTENTION}),
    "latent_one": ({}, {}),
    "latent_tp2sp": ({"tp": 2, "sequence_parallel": True}, {}),
    "latent_pp2": ({"pp": 2}, {}),
    "latent_ep2": ({"ep": 2}, {}),
    "latent_tp2sp_pp2_ep2": ({"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True}, {}),
    "moonlight_one": ({}, {"lora": LATENT_ATTENTION}),
    "moonlight_tp2sp": ({"tp": 2, "sequence_parallel": True}, {"lora": LATENT_ATTENTION}),
    "shared_one": ({}, {}),
    "shared_ep2": ({"ep": 2}, {}),
    "mixtral_one": ({}, {}),
    "mixtral_tp2sp_ep2": ({"tp": 2, "ep": 2, "sequence_parallel": True}, {}),
    "oss_one": ({}, {}),
    "oss_tp2sp_ep2": ({"tp": 2, "ep": 2, "sequence_parallel": True}, {}),
}


def whole_parameters(actor: Actor, take: Any) -> dict[str, torch.Tensor]:
    """``take(parameter)`` of all adapters of the whole model: name -> whole tensor, on every rank."""
    at = actor.context.coordinates
    own = {}
    for adapter in actor.engine.adapters.values():
        for letter, parameter in (("a", adapter.a), ("b", adapter.b)):
            own[f"{adapter.layer_name}.{letter}"] = (take(parameter).clone(), split_dim(adapter, letter))
    gathered: dict[str, dict[int, tuple]] = {}
    for tp, part in actor.context.gather_objects((at.tp, own)):
        for name, value in part.items():
            gathered.setdefault(name, {})[tp] = value
    return {name: assembled([parts[tp] for tp in sorted(parts)], name) for name, parts in gathered.items()}


def split_dim(adapter: LoraAdapter, letter: str) -> int | None:
    if is_whole(adapter):
        return None
    return {"a": 1 if adapter.row_parallel else None, "b": None if adapter.row_parallel else 0}[letter]


def is_whole(adapter: LoraAdapter) -> bool:
    """Not cut over tensor-parallel ranks."""
    return adapter.replicated or adapter.is_expert


def assembled(parts: list[tuple], name: str) -> torch.Tensor:
    tensors, dim = [tensor for tensor, _ in parts], parts[0][1]
    if dim is None:
        assert all(torch.equal(tensors[0], other) for other in tensors), f"{name}: ranks differ"
        return tensors[0]
    if name.endswith("linear_fc1.b"):  # of gates and ups
        return torch.cat([torch.cat([t.chunk(2)[half] for t in tensors]) for half in (0, 1)])
    return torch.cat(tensors, dim)


@torch.no_grad()
def set_b(actor: Actor) -> None:
    """The same B on every layout, drawn whole for each layer."""
    tp, size = actor.context.coordinates.tp, actor.context.sizes.tp
    for adapter in actor.engine.adapters.values():
        generator = torch.Generator().manual_seed(sum(map(ord, adapter.layer_name)))
        rows = adapter.b.shape[0] * (1 if adapter.row_parallel or is_whole(adapter) else size)
        whole = torch.randn(rows, adapter.b.shape[1], generator=generator) * 0.02
        if is_whole(adapter):
            pass
        elif adapter.gated:
            whole = torch.cat([half.chunk(size)[tp] for half in whole.chunk(2)])
        elif not adapter.row_parallel:
            whole = whole.chunk(size)[tp]
        adapter.b.copy_(whole)


def random_experts() -> PreTrainedModel:
    """A mixture of experts, the same on every rank."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(hf_config_from(EXPERTS, dtype="float32")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    return model


def source_of(name: str, folder: str) -> Any:
    """The model of a case."""
    kind = name.partition("_")[0]
    if kind == "experts":
        return random_experts()
    if kind not in MODELS:
        return folder
    model = two_layers(MODELS[kind], 512)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.zero_()  # or some experts get no token
    return model


def logprobs_of(actor: Actor, stage: Any, name: str) -> list[float]:
    at = actor.context
    batch = own_share(samples(), at.coordinates.dp, at.grid.dp)
    GRPO(actor, kl_coefficient=0.0).pack_stage().run(batch)
    stage.run(batch)
    by_replica = dict(at.gather_objects((at.coordinates.dp, batch[name].tolist())))
    return [value for dp in sorted(by_replica) for value in by_replica[dp]]


def run_case(model: str, folder: Path, name: str) -> dict:
    sizes, overrides = CASES[name]
    sgd = OptimizerConfig(optimizer="sgd", learning_rate=1e-2, clip_gradient=0.0)
    config = Actor.Config(optimizer=sgd, lora=LORA).model_dump() | overrides
    source, tokenizer = source_of(name, model), AutoTokenizer.from_pretrained(model)
    if source is not model and torch.distributed.get_world_size() == 1:
        source.save_pretrained(folder / f"{name} base")
    actor = Actor(source, tokenizer, parallel=ParallelSizes(**sizes), config=Actor.Config(**config))
    first = whole_parameters(actor, torch.Tensor.detach)
    fresh, own = Reference(actor), Reference(source, actor.tokenizer, context=actor.context)
    found = {name: logprobs_of(actor, stage.logprobs("ref"), "ref") for name, stage in (("off", fresh), ("own", own))}
    found["at first"] = logprobs_of(actor, actor.logprobs("seen"), "seen")
    set_b(actor)
    before = {name: tensor.clone() for name, tensor in actor.engine.tensors().items() if "_adapter" not in name}
    found["logprobs"] = logprobs_of(actor, actor.logprobs("seen"), "seen")
    found["off later"] = logprobs_of(actor, fresh.logprobs("ref"), "ref")
    context = actor.context
    batch = own_share(samples(), context.coordinates.dp, context.grid.dp)
    grpo = GRPO(actor, fresh, kl_coefficient=0.05, loss_aggregation="token-mean", old_logprobs="recompute")
    grpo.update()(batch)
    gradients = whole_parameters(actor, lambda parameter: parameter.main_grad)
    found["gap"] = rollout_gap(actor)
    actor.publish()
    actor.save_pretrained(folder / name)
    actor.save_adapters(folder / f"{name} peft", base=model)
    after = actor.engine.tensors()
    found["unchanged"] = all(context.gather_objects(all(torch.equal(before[n], after[n]) for n in before)))
    return found | {
        "first": first,
        "gradients": gradients,
        "metrics": {k: v for k, v in batch.metrics.items() if not k.startswith("time/")},
        "trained after": logprobs_of(actor, actor.logprobs("seen"), "seen"),
    }


def rollout_gap(actor: Actor) -> float:
    """Largest difference between the engine's log-probabilities of its samples and the trainer's of the same tokens."""
    prompts = [Prompt([1, 40 + i, 50, 60], index=i) for i in range(4)]
    made = actor.generate(prompts, temperature=1.0, max_tokens=8)
    for sample in made:
        sample.reward = 0.0
    batch = Batch(samples=made, temperature=1.0)
    GRPO(actor, kl_coefficient=0.0).pack_stage().run(batch)
    actor.logprobs("seen").run(batch)
    mask = batch["response_mask"].bool()
    seen = torch.tensor([p for sample in made for p in sample.rollout_logprobs])
    gap = float((batch["seen"][mask] - seen).abs().max())
    return max(actor.context.gather_objects(gap))


def main(run_case: Callable[[str, Path, str], dict[str, Any]], model: str, folder: Path, cases: list[str]) -> None:
    """Run each case and keep what it found in ``folder``."""
    current_platform().init_process_group(timeout=120)
    for name in cases:
        result = run_case(model, folder, name)
        ParallelContext.forget()
        if torch.distributed.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(run_case, sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
