"""The local decoder against transformers: same tokens, same log-probabilities."""

from __future__ import annotations

import dataclasses
from itertools import chain

import pytest
import torch
from rollout.rollout_models import CONFIGS, architecture_of, local_engine, random_model, reference_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.engines.megatron.model.rope import inverse_frequencies
from megatron_rl.rollout import SamplingParams

PROMPTS = [[5, 9, 11, 40, 3], [7], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31], [99, 98, 97]]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_greedy_tokens_and_logprobs_equal_transformers(name: str) -> None:
    model = random_model(name)
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    with local_engine(model) as engine:
        answers = engine.generate(PROMPTS, params)
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer.token_ids == output[0, len(prompt) :].tolist()
        expected = reference_logprobs(model, prompt, answer.token_ids)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_sampled_logprobs_are_those_of_the_full_softmax_at_the_temperature(name: str) -> None:
    model = random_model(name, seed=1)
    params = SamplingParams(n=3, max_tokens=20, temperature=0.7, top_k=20, top_p=0.9, ignore_eos=True)
    with local_engine(model) as engine:
        answers = engine.generate(PROMPTS, params)
    for prompt, samples in zip(PROMPTS, answers, strict=True):
        for sample in samples:
            expected = reference_logprobs(model, prompt, sample.token_ids, temperature=0.7)
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)


def test_real_model_greedy_text_equals_transformers(llama_folder: object) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    texts = ["Once upon a time, there was a boy named Tim.", "The dog", "Lily and Ben went to the park. They saw"]
    prompts = [tokenizer(text).input_ids for text in texts]
    with local_engine(model, eos_token_ids=[1]) as engine:
        answers = engine.generate(prompts, SamplingParams(max_tokens=60, temperature=0))
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=1)
        assert answer.token_ids == output[0, len(prompt) :].tolist()
        expected = reference_logprobs(model, prompt, answer.token_ids)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama3_rope", "qwen3", "mistral"])
def test_the_torch_ops_give_the_same_completions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(n=2, max_tokens=24, ignore_eos=True)
    model = random_model(name)
    with local_engine(model) as engine:
        expected = engine.generate(PROMPTS, params)
    monkeypatch.setenv("MEGATRON_RL_OPS", "decode_attention=reference,add_rms_norm=reference")
    with local_engine(model) as engine:
        answers = engine.generate(PROMPTS, params)
    for mine, theirs in zip(answers, expected, strict=True):
        assert [c.token_ids for c in mine] == [c.token_ids for c in theirs]
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


def test_an_unknown_rope_scaling_is_refused() -> None:
    model = random_model("llama")
    architecture = dataclasses.replace(architecture_of(model.config), rope_scaling=(("rope_type", "dynamic"),))
    with pytest.raises(ValueError, match="'dynamic'"):
        inverse_frequencies(architecture)


def test_bf16_logprobs_stay_near_fp32() -> None:
    model = random_model("qwen3")
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    with local_engine(model, dtype=torch.bfloat16) as engine:
        answers = engine.generate(PROMPTS, params)
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        expected = reference_logprobs(model, prompt, answer.token_ids)
        assert (torch.tensor(answer.logprobs) - expected).abs().mean() < 0.1


def test_long_prompts_whose_mlp_takes_several_rounds_give_the_same_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("qwen3")
    params = SamplingParams(n=2, max_tokens=12, ignore_eos=True)
    with local_engine(model) as engine:
        at_once = engine.generate(PROMPTS, params)
        monkeypatch.setattr("megatron_rl.rollout.local.decoder.MLP_TOKENS", 5)
        in_rounds = engine.generate(PROMPTS, params)
    for left, right in zip(chain(*at_once), chain(*in_rounds), strict=True):
        assert left.token_ids == right.token_ids
        torch.testing.assert_close(torch.tensor(left.logprobs), torch.tensor(right.logprobs), atol=1e-5, rtol=0)
