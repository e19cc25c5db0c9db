"""Adapters on one rank: values and gradients against plain torch, what is allocated, refused and exported."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.oracle import LLAMA, QWEN3_MOE
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_rl.batch import Batch, Prompt
from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import LoraConfig, OptimizerConfig
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.engines.megatron.model.lora import add_adapters
from megatron_rl.models import Architecture
from megatron_rl.models.hf_config import hf_config_from
from megatron_rl.models.lora_update import merged
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers import Actor, Critic, Reference
from megatron_rl.workers.loss import LossInputs, LossOutput

SMALL = replace(LLAMA, num_layers=2, hidden=32, ffn=48, num_kv_heads=4, head_dim=4)
LORA = {"rank": 3, "alpha": 4.5}
SCALE = 1.5


@pytest.fixture(scope="module")
def context() -> ParallelContext:
    return ParallelContext.create(ParallelSizes(), seed=1)


class Tokenizer(SimpleNamespace):
    """As little of a tokenizer as an actor needs."""

    pad_token_id, eos_token_id, bos_token_id, pad_token, eos_token = 0, 2, 1, "p", "e"

    def __len__(self) -> int:
        return 50

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Its text is never looked at."""
        return str(ids)

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


def random_hf(architecture: Architecture, seed: int = 2) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config_from(architecture, dtype="float32")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    return model


def lora_actor(context: ParallelContext, architecture: Architecture = SMALL, **overrides: Any) -> Actor:
    optimizer = overrides.pop("optimizer", OptimizerConfig(optimizer="sgd", learning_rate=0.1, clip_gradient=0.0))
    config = Actor.Config(**{"lora": LORA, "optimizer": optimizer} | overrides)
    actor = Actor(random_hf(architecture), Tokenizer(), context=context, config=config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in actor.engine.adapters.values():
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator) * 0.1)
    return actor


def batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, 50, (length,), generator=generator).tolist() for length in (5, 9, 2, 12)]
    made = Batch.from_sequences(rows, [[0] + [1] * (len(row) - 1) for row in rows])
    made.tokens["weights"] = torch.rand(28, generator=generator)
    return made


def weighted(inputs: LossInputs) -> LossOutput:
    return LossOutput(-(inputs.logprobs * inputs.fields["weights"] * inputs.mask).sum(), {})


def hf_deltas(a: Architecture, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Update of each Hugging Face weight, from the fused layers' A and B, by view and chunk."""
    deltas = {}
    for layer in range(a.num_layers):
        hf, own = f"model.layers.{layer}.", f"decoder.layers.{layer}."

        def delta(module: str, own: str = own) -> Tensor:
            return SCALE * parameters[own + module + ".b"] @ parameters[own + module + ".a"]

        groups = delta("self_attention.linear_qkv").view(a.num_kv_heads, -1, a.head_dim, a.hidden)
        heads = a.num_heads // a.num_kv_heads
        for letter, part in zip("qkv", groups.split([heads, 1, 1], dim=1), strict=True):
            deltas[f"{hf}self_attn.{letter}_proj.weight"] = part.reshape(-1, a.hidden)
        deltas[f"{hf}self_attn.o_proj.weight"] = delta("self_attention.linear_proj")
        gate, up = delta("mlp.linear_fc1").chunk(2)
        deltas |= {f"{hf}mlp.gate_proj.weight": gate, f"{hf}mlp.up_proj.weight": up}
        deltas[f"{hf}mlp.down_proj.weight"] = delta("mlp.linear_fc2")
    return deltas


def adapters_of(actor: Actor) -> dict[str, torch.nn.Parameter]:
    found = actor.engine.adapters.values()
    return {f"{x.layer_name}.{letter}": getattr(x, letter) for x in found for letter in "ab"}


def plain_logprobs(actor: Actor, parameters: dict[str, Tensor]) -> Tensor:
    """Float64 log-probabilities of the batch's tokens in plain torch, 0 at each sequence's first."""
    model = random_hf(SMALL).double()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    weights |= {name: weights[name] + update for name, update in hf_deltas(SMALL, parameters).items()}
    found = []
    for row in batch()["input_ids"].split(batch().lengths.tolist()):
        logits = functional_call(model, weights, (row[None],)).logits[0, :-1]
        found += [row.new_zeros(1).double(), logits.log_softmax(-1).gather(-1, row[1:, None])[:, 0]]
    return torch.cat(found)


def test_logprobs_and_gradients_are_those_of_plain_torch_in_float64(context) -> None:
    actor = lora_actor(context)
    leaves = {n: p.detach().double().requires_grad_() for n, p in adapters_of(actor).items()}
    expected = plain_logprobs(actor, leaves)
    given = batch()
    actor.logprobs("seen").run(given)
    assert torch.allclose(given["seen"].double(), expected.detach(), atol=1e-5, rtol=1e-6)
    (-(expected * given["weights"]).sum()).backward()
    metrics = actor.optimize(given, weighted, reads=("weights",))
    for name, parameter in adapters_of(actor).items():
        exact = leaves[name].grad
        assert (parameter.main_grad.double() - exact).norm() < 2e-6 * exact.norm(), name
    norm = torch.cat([leaf.grad.flatten() for leaf in leaves.values()]).norm()
    assert metrics["optimizer/gradient_norm"] == pytest.approx(float(norm), rel=1e-6)


def test_only_adapters_have_gradient_buffers_and_optimizer_state(context) -> None:
    adam = OptimizerConfig(learning_rate=1e-2)
    actor, full = lora_actor(context, optimizer=adam), lora_actor(context, lora=None, optimizer=adam)
    for one in (actor, full):
        one.optimize(batch(), weighted, reads=("weights",))
    adapted = sum(parameter.numel() for parameter in adapters_of(actor).values())
    assert adapted == 2 * 3 * ((32 + 64) + (32 + 32) + (32 + 96) + (48 + 32))
    assert state_numbers(actor) == 2 * adapted
    assert gradient_numbers(actor) < adapted + 64 * len(adapters_of(actor)) + 256  # padding
    assert gradient_numbers(full) > 5 * gradient_numbers(actor)


def gradient_numbers(actor: Actor) -> int:
    return sum(buffer.grad_data.numel() for chunk in actor.engine.chunks for buffer in chunk.buffers)


def state_numbers(actor: Actor) -> int:
    """Elements of Adam's moments."""
    parts = getattr(actor.engine.optimizer, "chained_optimizers", [actor.engine.optimizer])
    states = [state for part in parts for state in part.optimizer.state.values()]
    return sum(value.numel() for state in states for name, value in state.items() if name != "step")


def test_exported_model_gives_the_trainers_logprobs_in_transformers(context, tmp_path) -> None:
    actor = lora_actor(context)
    actor.optimize(batch(), weighted, reads=("weights",))
    actor.save_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    given = batch()
    actor.logprobs("seen").run(given)
    for row, seen in zip(*(given[name].split(given.lengths.tolist()) for name in ("input_ids", "seen")), strict=True):
        with torch.no_grad():
            logprobs = model(row[None]).logits[0, :-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0]
        assert torch.allclose(seen[1:], logprobs, atol=1e-5)


def test_merging_rounds_once_from_fp32_and_leaves_the_weight_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((40, 30), (4, 30), (40, 4)))
    kept = weight.clone()
    exact = (weight.double() + 0.25 * b.double() @ a.double()).bfloat16()
    found = merged(weight, a, b, 0.25)
    assert found.dtype == torch.bfloat16
    assert (found != exact).sum() <= 2  # fp32 may fall on the other side of a tie
    assert torch.equal(weight, kept)


def test_adapters_that_are_off_or_new_change_nothing(context) -> None:
    actor = lora_actor(context)
    found = {}
    with actor.engine.base():
        found["off"] = logprobs(actor)
    plain = Actor(random_hf(SMALL), Tokenizer(), context=context)
    assert torch.equal(found["off"], logprobs(plain))
    assert not torch.equal(found["off"], logprobs(actor))
    given = batch()
    Reference(actor).logprobs("ref").run(given)
    assert torch.equal(given["ref"], found["off"])
    assert Reference(actor).state() is None, "no copy of the weights is held"


def logprobs(actor: Actor) -> Tensor:
    given = batch()
    actor.logprobs("seen").run(given)
    return given["seen"]


def test_dropout_acts_in_training_only(context) -> None:
    actor = lora_actor(context, lora=LORA | {"dropout": 0.5})
    assert torch.equal(logprobs(actor), logprobs(lora_actor(context)))
    adapter = next(iter(actor.engine.adapters.values())).train()
    x = torch.ones(4000, 1, 32)
    outputs = torch.stack([adapter(x) for _ in range(2)])
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.allclose(outputs.mean((0, 1, 2)), adapter.eval()(x[:1])[0, 0], rtol=0.1, atol=0.01)


def test_a_value_head_is_trained_whole(context) -> None:
    actor = lora_actor(context, value_head=True)
    trained = {name for name, parameter in actor.engine.parameters().items() if parameter.requires_grad}
    assert {name for name in trained if "_adapter." not in name} == {"value_head.weight"}


def test_experts_and_their_attention_have_adapters_or_attention_alone(context) -> None:
    plain = logprobs(Actor(random_hf(QWEN3_MOE), Tokenizer(), context=context))
    experts, layers = QWEN3_MOE.experts, QWEN3_MOE.num_layers
    assert experts is not None
    dense = len(experts.dense_layers)
    each = dense + (layers - dense) * experts.num_experts
    for targets, number in ((("linear_qkv", "linear_proj"), 2 * layers), (("linear_fc2",), each)):
        actor = lora_actor(context, QWEN3_MOE, lora=LORA | {"target_modules": targets})
        assert len(actor.engine.adapters) == number
        assert not torch.equal(logprobs(actor), plain)


def test_experts_that_cannot_have_adapters_are_refused(context) -> None:
    config = transformer_config(QWEN3_MOE, context.sizes)
    for field, value, remedy in (
        ("moe_grouped_gemm", True, "moe_grouped_gemm=False"),
        ("expert_tensor_parallel_size", 2, "set etp=1"),
    ):
        chunks = build_model(QWEN3_MOE, config)
        chunks[0].config = copy.copy(config)
        setattr(chunks[0].config, field, value)
        with pytest.raises(ConfigError, match=remedy):
            add_adapters(chunks, LoraConfig(), seed=0)
        assert add_adapters(chunks, LoraConfig(target_modules=("linear_proj",)), seed=0)


def test_projections_that_a_model_has_not_are_refused(context) -> None:
    with pytest.raises(ConfigError, match="linear_kv_up_proj, but layer 0 has no such linear layer"):
        lora_actor(context, lora=LORA | {"target_modules": ("linear_kv_up_proj",)})


def test_a_jobs_own_bare_chunks_get_adapters_and_wrapped_ones_are_refused(context) -> None:
    config = transformer_config(SMALL, context.sizes)
    actor = Actor(build_model(SMALL, config), Tokenizer(), context=context, config=Actor.Config(lora=LORA))
    assert len(actor.engine.adapters) == 4 * SMALL.num_layers
    with pytest.raises(ConfigError, match="linear_fc1_adapter"):  # adapters of its own have no place in an export
        Actor(actor.engine.chunks, Tokenizer(), context=context, config=Actor.Config(lora=LORA))
    wrapped = Actor(build_model(SMALL, config), Tokenizer(), context=context).engine.chunks
    with pytest.raises(ConfigError, match="Give bare chunks without an optimizer"):
        Actor(wrapped, Tokenizer(), context=context, config=Actor.Config(lora=LORA))


def test_settings_that_cannot_work_are_refused(context) -> None:
    with pytest.raises(ConfigError, match="linear_out"):
        LoraConfig.parse({"target_modules": ["linear_out"]}, where="lora")
    with pytest.raises(ConfigError, match="rank = 0"):
        LoraConfig.parse({"rank": 0}, where="lora")
    chunks = build_model(SMALL, transformer_config(SMALL, context.sizes))
    with pytest.raises(ConfigError, match=r"target_modules = \(\)"):
        add_adapters(chunks, LoraConfig(target_modules=()), seed=0)


def test_first_values_depend_on_seed_and_layer_only(context) -> None:
    one, again, other = (lora_actor(context, seed=seed) for seed in (0, 0, 1))
    a = [adapters_of(actor)["decoder.layers.1.mlp.linear_fc2.a"] for actor in (one, again, other)]
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[0], a[2])
    assert a[0].abs().max() <= 48**-0.5
    assert float(a[0].detach().std()) == pytest.approx(48**-0.5 / 3**0.5, rel=0.15)  # of a uniform distribution


def test_pushes_and_exports_change_no_frozen_weight_and_agree(context, tmp_path) -> None:
    actor = lora_actor(context)
    before = {name: tensor.clone() for name, tensor in actor.engine.tensors().items()}
    for version in range(3):
        actor.rollouts.weights.trained_version = version
        actor.publish()
        actor.save_pretrained(tmp_path / "hf", overwrite=True)
    after = actor.engine.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    held = actor.rollouts.engine.targets()
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for layer in range(SMALL.num_layers):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        assert torch.equal(held[name], exported[name])
    actor.close()


def test_half_precision_trains_and_serves_what_it_trains(context) -> None:
    adam = OptimizerConfig(learning_rate=1e-2)
    actor = lora_actor(context, dtype="bfloat16", optimizer=adam)
    assert {parameter.dtype for parameter in adapters_of(actor).values()} == {torch.bfloat16}
    losses = [actor.optimize(batch(), weighted, reads=("weights",))["loss/total"] for _ in range(4)]
    assert losses[-1] < 0.9 * losses[0]
    made = actor.generate([Prompt([5, 6, 7], index=0)], temperature=1.0, max_tokens=12)
    (sample,) = made
    ids = sample.prompt.token_ids + sample.response_ids
    given = Batch.from_sequences([ids], [[0] * 3 + [1] * len(sample.response_ids)])
    actor.logprobs("seen").run(given)
    assert torch.allclose(given["seen"][3:], torch.tensor(sample.rollout_logprobs), atol=0.1)
    actor.close()


def test_a_critic_trains_adapters_and_its_head_and_is_saved_merged(context, tmp_path) -> None:
    sgd = OptimizerConfig(optimizer="sgd", learning_rate=0.05, clip_gradient=0.0)
    critic = Critic(random_hf(SMALL), context=context, config=Critic.Config(lora=LORA, optimizer=sgd))
    trained = {name for name, parameter in critic.engine.parameters().items() if parameter.requires_grad}
    assert {name for name in trained if "_adapter." not in name} == {"output_layer.weight"}
    first = values_of(critic)
    for _ in range(3):
        critic.optimize(batch(), lambda inputs: LossOutput(((inputs.values - 1.0) ** 2 * inputs.mask).mean(), {}))
    assert any(adapter.b.any() for adapter in critic.engine.adapters.values())
    assert not torch.allclose(values_of(critic), first)
    critic.save_pretrained(tmp_path / "critic")
    again = Critic(str(tmp_path / "critic"), context=context)
    assert torch.allclose(values_of(again), values_of(critic), atol=1e-5)


def test_adapters_alone_are_saved_of_policies_that_have_some(context, tmp_path) -> None:
    sgd = OptimizerConfig(optimizer="sgd", learning_rate=0.05)
    critic = Critic(random_hf(SMALL), context=context, config=Critic.Config(lora=LORA, optimizer=sgd))
    for worker in (critic, Actor(random_hf(SMALL), Tokenizer(), context=context)):
        with pytest.raises(ConfigError, match="use save_pretrained"):
            worker.save_adapters(tmp_path / "adapters")
    actor = lora_actor(context)
    actor.save_adapters(tmp_path / "adapters")
    with pytest.raises(ConfigError, match="exists"):
        actor.save_adapters(tmp_path / "adapters")


def values_of(critic: Critic) -> Tensor:
    given = batch()
    critic.values("seen").run(given)
    return given["seen"]
