"""Which engine trains what, and what is refused, on one rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from engines.fsdp2.steps import Tokenizer, dpo_step
from engines.fsdp2.tiny_models import SIZES, TOKENS, tiny_model
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from megatron_rl.config import ConfigError
from megatron_rl.engines.build import check_sizes
from megatron_rl.models.hf_config import best_architecture
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers import Actor


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    yield ParallelContext.create(ParallelSizes(), seed=1)
    ParallelContext.forget()


class PlainConfig(LlamaConfig):
    model_type = "my_llama"


class PlainLlama(LlamaForCausalLM):
    """Changes nothing."""

    config_class = PlainConfig


class LongerLlama(LlamaForCausalLM):
    """A linear layer more, without a forward pass of its own."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.model.norm = nn.Sequential(self.model.norm, nn.Linear(width, width, bias=False))


class LouderLlama(LlamaForCausalLM):
    """A forward pass of its own."""

    def forward(self, *given, **named):
        found = super().forward(*given, **named)
        found.logits = found.logits * 2.0
        return found


def made(cls: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return cls((cls.config_class or LlamaConfig)(dtype="float32", **SIZES, **TOKENS))


def actor_of(context: ParallelContext, model: object, **config: object) -> Actor:
    return Actor(model, Tokenizer(), context=context, config=config)


def test_a_model_without_a_family_is_trained_under_fsdp2_and_the_log_says_so(context, caplog):
    with caplog.at_level(logging.INFO, logger="megatron_rl"):
        actor = actor_of(context, tiny_model("olmo2"))
    assert type(actor.engine).__name__ == "FSDP2Engine"
    assert "actor: trained under FSDP2, data parallel only, since model type 'olmo2' is not supported" in caplog.text
    with pytest.raises(ConfigError, match="model type 'olmo2' is not supported"):
        actor_of(context, tiny_model("olmo2"), backend="megatron")


def test_a_family_s_model_is_trained_by_megatron_unless_fsdp2_is_asked_for(context):
    assert type(actor_of(context, made(LlamaForCausalLM)).engine).__name__ == "MegatronEngine"
    assert type(actor_of(context, made(LlamaForCausalLM), backend="fsdp2").engine).__name__ == "FSDP2Engine"


def test_a_subclass_that_changes_nothing_is_its_parent(context, tmp_path):
    model = made(PlainLlama)
    actor = actor_of(context, model)
    assert type(actor.engine).__name__ == "MegatronEngine"
    assert actor.engine.architecture.family == "llama"
    loaded = LlamaForCausalLM.from_pretrained(actor.save_pretrained(tmp_path / "out"))
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "llama"


@pytest.mark.parametrize(
    ("cls", "differs"),
    [
        (LongerLlama, "2 tensors that a llama model does not have, first 'model.norm.0.weight'"),
        (LouderLlama, "forward of its own"),
    ],
)
def test_a_class_that_computes_something_else_is_refused_by_megatron_and_trained_as_it_is(
    context, tmp_path, cls, differs
):
    with pytest.raises(ConfigError, match=differs):
        actor_of(context, made(cls), backend="megatron")
    actor = actor_of(context, made(cls), optimizer={"learning_rate": 1e-2})
    assert type(actor.engine).__name__ == "FSDP2Engine"
    before = {name: tensor.clone() for name, tensor in actor.engine.tensors().items()}
    dpo_step(actor)
    moved = {name for name, tensor in actor.engine.tensors().items() if not torch.equal(tensor, before[name])}
    assert moved == before.keys()
    loaded = cls.from_pretrained(actor.save_pretrained(tmp_path / "out"))
    held = actor.engine.tensors()
    assert all(torch.equal(tensor, held[name]) for name, tensor in loaded.named_parameters())


@pytest.mark.parametrize("axis", ["tp", "pp", "cp", "ep"])
def test_more_than_data_parallelism_is_refused(axis):
    architecture = best_architecture(tiny_model("olmo2").config)
    with pytest.raises(ConfigError, match="backend fsdp2 is data parallel only, but the layout is"):
        check_sizes(architecture, ParallelSizes(**{axis: 2}))


def test_settings_that_fsdp2_lacks_are_refused(context):
    for settings, message in (
        ({"dtype": "float16"}, "has no loss scaling"),
        ({"lora": {"target_modules": ["linear_fc1"]}}, "names no linear layer of GPT2LMHeadModel"),
    ):
        with pytest.raises(ConfigError, match=message):
            actor_of(context, tiny_model("gpt2"), **settings)
    with pytest.raises(ConfigError, match="packing=true, but BloomForCausalLM does not keep packed sequences apart"):
        actor_of(context, tiny_model("bloom"), packing=True)
    with pytest.raises(ConfigError, match="Megatron model chunks were given"):
        actor_of(context, [nn.Linear(1, 1)], backend="fsdp2")
