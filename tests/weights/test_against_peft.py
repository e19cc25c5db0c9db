"""Folders of adapters against PEFT itself: what is written here gives the same logits there, and what PEFT writes
starts the same model here. With `make test-peers`, which installs PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import two_layers
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl.batch import Batch
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers import Actor
from megatron_rl.workers.loss import LossOutput

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
    sgd = OptimizerConfig(optimizer="sgd", learning_rate=0.01, clip_gradient=0.0)
    return Actor(model, Tokenizer(), context=context, config=Actor.Config(lora=lora, optimizer=sgd))


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


FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "some projections of a dense layer": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "all linear layers, rslora, patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "latent attention by a regex": ("deepseek_v3", {"target_modules": r".*\.self_attn\.(q_b|kv_b|o)_proj"}),
    "stacked experts": (
        "mixtral",
        {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "experts by their old names": ("qwen2_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "transposed experts": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_peft_wrote_is_trained_as_peft_trains_it(case, context, tmp_path):
    """One SGD step of the same loss: logits before it, and every matrix after it."""
    name, fields = FOLDERS[case]
    base = two_layers(name, 512)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=4, **fields))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for own, parameter in theirs.named_parameters():
            if "lora_B" in own:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path / "given")
    actor = actor_of(base, context, {"path": str(tmp_path / "given")})
    rows = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (5, 9, 12)]
    batch = Batch.from_sequences(rows, [[0] + [1] * (len(row) - 1) for row in rows])
    actor.logprobs("seen").run(batch)
    theirs.eval()
    expected = []
    for row in rows:
        logits = theirs(torch.tensor([row])).logits[0, :-1]
        expected += [logits.new_zeros(1), logits.log_softmax(-1).gather(-1, torch.tensor(row)[1:, None])[:, 0]]
    loss = -torch.cat(expected).sum()
    assert torch.allclose(batch["seen"], torch.cat(expected).detach(), atol=2e-5)
    loss.backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    actor.optimize(batch, lambda inputs: LossOutput(-(inputs.logprobs * inputs.mask).sum(), {}))
    actor.save_adapters(tmp_path / "ours")
    ours = peft.PeftModel.from_pretrained(two_layers(name, 512), tmp_path / "ours")
    found, wanted = (model.merge_and_unload().state_dict() for model in (ours, theirs))
    for parameter, value in wanted.items():
        assert torch.allclose(found[parameter], value, atol=1e-5), parameter
