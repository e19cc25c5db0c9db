"""Models without a family on real servers: SGLang's own loader places what FSDP2 trains, and their files name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.fsdp2 import tiny_models
from integration.environment import sglang_python
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from megatron_rl.algorithms import GRPO
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.config import ConfigError
from megatron_rl.workers.actor import Actor
from megatron_rl.workers.reward_model import RewardModel

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
VOCAB = 128
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "max_position_embeddings": 256}
GPT2 = {"n_embd": 128, "n_head": 4, "n_positions": 256}
PROMPTS = [[5, 9, 11, 40, 3], list(range(60, 90)), [7]]


def write_model(folder: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    sizes = GPT2 if model_type == "gpt2" else SIZES
    config = tiny_models.CONFIGS[model_type] | sizes | {"vocab_size": VOCAB}
    monkeypatch.setitem(tiny_models.CONFIGS, model_type, config)
    model = tiny_models.tiny_model(model_type)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"<{i}>": i for i in range(VOCAB)}, unk_token="<0>"))
    special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>", "unk_token": "<0>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return model


def actor_of(folder: Path, **options: Any) -> Actor:
    server = {"python": sglang_python(), "context_length": 256, "max_total_tokens": 4096}
    rollout = {
        "engine": "sglang",
        "max_running": 8,
        "max_staging_bytes": 1 << 20,
        "options": {"server": server} | options,
    }
    config = {"rollout": rollout, "optimizer": {"learning_rate": 1e-3}}
    return Actor(str(folder), PreTrainedTokenizerFast.from_pretrained(folder), config=config)


def largest_error(samples: list[Sample], model: PreTrainedModel) -> float:
    """Of a log-probability that the server gave, against the module itself."""
    worst = 0.0
    for sample in samples:
        row = torch.tensor([[*sample.prompt.token_ids, *sample.response_ids]])
        with torch.no_grad():
            logprobs = model(row).logits[0].float().log_softmax(-1)[:-1].gather(1, row[0, 1:, None])[:, 0]
        drawn = torch.tensor(sample.rollout_logprobs)
        worst = max(worst, float((logprobs[-len(drawn) :] - drawn).abs().max()))
    return worst


# The attention and the feed-forward matrices of GPT-2, which SGLang turns round, weight and bias of two layers.
@pytest.mark.parametrize(("model_type", "unproved"), [("olmo2", []), ("gpt2", ["transformer.h.0.attn.c_attn.weight"])])
def test_a_grpo_step_through_a_server(
    model_type: str,
    unproved: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = write_model(tmp_path / "model", model_type, monkeypatch)
    actor = actor_of(tmp_path / "model")
    try:
        reward = RewardModel(lambda sample: float(sum(sample.response_ids) % 2)).score()
        flow = actor.sample(n=4, max_tokens=8) >> reward >> GRPO(actor, kl_coefficient=0.0).update()
        for version in (0, 1):
            if version:
                actor.save_pretrained(tmp_path / "trained")
                before, model = model, AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
                moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True)]
                assert all(moved)
            batch = Batch(prompts=[Prompt(ids, index=i) for i, ids in enumerate(PROMPTS)])
            with caplog.at_level(logging.WARNING):
                flow(batch)
            assert {sample.policy_version for sample in batch.samples} == {version}
            worst = largest_error(batch.samples, model.eval())
            print(f"{model_type}, version {version}: log-probabilities within {worst:.1e} of transformers")
            assert worst < 1e-4
        assert actor.verify_weights().compared == 1
        said = [record.getMessage() for record in caplog.records if "cannot be verified" in record.getMessage()]
        assert bool(said) == bool(unproved)
        assert all(name in said[0] for name in unproved)
    finally:
        actor.close()


def test_a_model_that_sglang_does_not_know_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, "bloom", monkeypatch)
    with pytest.raises(ConfigError, match="delivery=direct, but model type 'bloom' has no family here"):
        actor_of(tmp_path, delivery="direct").generate([Prompt([5, 6])], max_tokens=2)
    actor = actor_of(tmp_path)
    try:
        with pytest.raises(ConfigError, match=r"type 'bloom'.*ValueError: BloomForCausalLM has .*engine=transformers"):
            actor.generate([Prompt([5, 6])], max_tokens=2)
    finally:
        actor.close()
