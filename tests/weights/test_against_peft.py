"""Folders of adapters against PEFT itself: what is written here gives the same logits there, and what PEFT writes
starts the same model here. With `make test-peers`, which installs PEFT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import two_layers
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers import Actor

peft = pytest.importorskip("peft", reason="make test-peers installs PEFT")

MODELS = ("llama", "deepseek_v3", "deepseek_v3, moonlight", "qwen2_moe", "mixtral", "gpt_oss")
LORA = {"rank": 4, "alpha": 6.0}


class Tokenizer(SimpleNamespace):
    """As little of a tokenizer as an actor needs."""

    pad_token_id, eos_token_id, bos_token_id, pad_token, eos_token = 0, 2, 1, "p", "e"

    def __len__(self) -> int:
        return 512

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


@pytest.fixture(scope="module")
def context() -> ParallelContext:
    return ParallelContext.create(ParallelSizes(), seed=1)


def actor_of(model: Any, context: ParallelContext, lora: dict[str, Any]) -> Actor:
    return Actor(model, Tokenizer(), context=context, config=Actor.Config(lora=lora))


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 512, (3, 17), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(ids).logits


@torch.no_grad()
def set_b(actor: Actor) -> None:
    generator = torch.Generator().manual_seed(3)
    for adapter in actor.engine.adapters.values():
        adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("model", MODELS)
def test_peft_computes_the_exported_model_from_its_base_and_our_adapters(model, context, tmp_path):
    base = two_layers(model, 512)
    actor = actor_of(base, context, LORA)
    set_b(actor)
    actor.save_pretrained(tmp_path / "merged")
    actor.save_adapters(tmp_path / "adapters")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (expected - logits(base)).abs().max() > 0.1
    found = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapters"))
    assert (found - expected).abs().max() <= 1e-4
