"""A real SGLang server (CPU) as reward service: its ``/classify`` gives the classifier's own logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from integration.environment import own_sglang_python
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from megatron_rl import RewardModel
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.rewards import RewardError
from megatron_rl.rollout.sglang.server import ServerConfig, SGLangServer

pytestmark = pytest.mark.integration

CONTEXT = 256


@pytest.fixture(scope="module")
def classifier(seeded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with one output, and large enough weights that texts differ."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.1,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(seeded_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(classifier: Path) -> Iterator[SGLangServer]:
    """Started as users start it; other modules have it forked."""
    config = ServerConfig(
        python=own_sglang_python(), context_length=CONTEXT, max_total_tokens=4096, args={"is-embedding": True}
    )
    server = SGLangServer(
        classifier, config, dtype="float32", max_running=8, device="cpu", load_weights=True, name="classify"
    )
    try:
        yield server.start()
    finally:
        server.close()


def samples(*responses: str) -> list[Sample]:
    prompts = [Prompt([1], text="Once upon a time, there was ", index=i) for i in range(len(responses))]
    return [Sample(p, [2], [0.0], response_text=text) for p, text in zip(prompts, responses, strict=True)]


def test_rewards_are_the_logits_of_the_model(server: SGLangServer, classifier: Path) -> None:
    responses = ("a girl named Lily.", "a big dog. He ran home.", "", "a boy. The boy was sad " * 3)
    batch = Batch(samples=samples(*responses))
    RewardModel(server.url, kind="sglang", batch_size=3).score().run(batch)
    model = LlamaForSequenceClassification.from_pretrained(classifier)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    with torch.no_grad():
        truth = [
            model(**tokenizer(s.prompt.text + s.response_text, return_tensors="pt", return_token_type_ids=False))
            for s in batch.samples
        ]
    wanted = torch.tensor([float(found.logits[0, 0]) for found in truth])
    assert wanted.std() > 0.1
    torch.testing.assert_close(batch.sequences["rewards"], wanted, atol=1e-3, rtol=1e-3)


def test_one_text_that_is_too_long_costs_only_itself(server: SGLangServer) -> None:
    batch = Batch(samples=samples("a girl.", "dog cat " * 400, "a boy."))
    kept = [batch.samples[0], batch.samples[2]]
    RewardModel(server.url, kind="sglang", on_failure="drop", retries=0).score().run(batch)
    assert batch.samples == kept
    assert batch.metrics["reward_service/sglang/dropped_count"] == 1


def test_asked_as_another_kind_it_says_so(server: SGLangServer) -> None:
    model = RewardModel(server.url, kind="tei", retries=0)
    with pytest.raises(RewardError, match=r"status 404.*is the kind of service right\?"):
        model.score().run(Batch(samples=samples("a girl.")))
