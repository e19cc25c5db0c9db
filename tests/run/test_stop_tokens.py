"""Every stop token of generation_config.json ends answers, as in `transformers`; the file goes where the weights go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_run import write_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_rl.batch import Batch, Prompt
from megatron_rl.config import ConfigError
from megatron_rl.rollout.base import SamplingParams
from megatron_rl.rollout.sglang.generation import GenerateRequest
from megatron_rl.workers import Actor

PROMPT, LENGTH = [1, 5, 4, 14, 6, 4, 15], 24


def greedy(folder: Path) -> list[int]:
    """What `transformers` answers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([PROMPT])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
    return made[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose greedy answer has a further stop token in its middle, told by generation_config.json alone."""
    folder = tmp_path_factory.mktemp("stops")
    write_run(folder)
    model = folder / "model"
    config = AutoConfig.from_pretrained(model, tie_word_embeddings=False, initializer_range=0.5)
    stops: list[int] = []
    for seed in range(50):  # until an answer goes on for a while and has a token that is new in its middle
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        (model / "generation_config.json").unlink()
        answer = greedy(model)
        stops = [t for place, t in enumerate(answer) if 2 < place < len(answer) - 2 and t not in answer[:place]]
        if stops:
            break
    stop = stops[0]
    fields = {"eos_token_id": [2, stop], "temperature": 0.7, "do_sample": False, "made_by": "somebody"}
    (model / "generation_config.json").write_text(json.dumps(fields))
    assert greedy(model) == answer[: answer.index(stop) + 1] != answer
    return model


def generation(folder: Path) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


def actor_of(model: object, folder: Path) -> Actor:
    return Actor(model, AutoTokenizer.from_pretrained(folder))


def test_rollouts_and_evaluation_stop_where_transformers_stops(folder):
    expected, actor = greedy(folder), actor_of(str(folder), folder)
    (evaluated,) = actor.generate([Prompt(PROMPT)], max_tokens=LENGTH)
    batch = Batch(prompts=[Prompt(PROMPT)])
    actor.sample(n=1, temperature=0.0, max_tokens=LENGTH).run(batch)
    for sample in (evaluated, batch.samples[0]):
        assert (sample.response_ids, sample.finish_reason) == (expected, "stop")
    stops = generation(folder)["eos_token_id"]
    assert GenerateRequest(0, PROMPT, [1], SamplingParams(), actor.rollouts.eos).stop_token_ids == set(stops)
    assert actor.tokenizer.eos_token_id == 2


def test_the_file_is_kept_whole_in_exports_and_checkpoints(folder, tmp_path):
    actor = actor_of(str(folder), folder)
    actor.save_pretrained(tmp_path / "hf")
    (tmp_path / "step").mkdir()
    actor.describe_into(tmp_path / "step")
    for written in (tmp_path / "hf", tmp_path / "step" / "hf"):
        assert generation(written) == generation(folder)
    assert greedy(tmp_path / "hf") == greedy(folder)
    again = actor_of(str(tmp_path / "hf"), folder)
    assert again.rollouts.eos == actor.rollouts.eos


def test_a_model_in_memory_brings_its_stop_tokens(folder, tmp_path):
    actor = actor_of(AutoModelForCausalLM.from_pretrained(folder), folder)
    assert set(actor.rollouts.eos) == set(generation(folder)["eos_token_id"])
    actor.save_pretrained(tmp_path / "hf")
    assert generation(tmp_path / "hf")["eos_token_id"] == generation(folder)["eos_token_id"]


def test_the_tokenizers_own_eos_joins_those_of_the_file(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = generation(folder)["eos_token_id"]
    own = next(token for token in range(3, 16) if token not in stops)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(own)
    actor = Actor(str(folder), tokenizer)
    assert actor.rollouts.eos == (own, *stops)
    actor.save_pretrained(tmp_path / "hf")
    assert generation(tmp_path / "hf")["eos_token_id"] == [*stops, own]


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}'])
def test_a_broken_file_is_one_clear_error(folder, tmp_path, text):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        actor_of(str(tmp_path), folder)
