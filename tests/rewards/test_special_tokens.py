"""Rewards see the special tokens that they name; EOS and padding never."""

from __future__ import annotations

import re

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from megatron_rl.batch import Prompt, Sample
from megatron_rl.config import ConfigError
from megatron_rl.rewards import RegexReward
from megatron_rl.rewards.special import TokenNames
from megatron_rl.workers.response_text import ResponseDecoder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    model = Tokenizer(BPE(letters, []))
    model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    # One that transformers does not list among its special tokens, but that decoding leaves out all the same.
    model.add_special_tokens([AddedToken("<|call|>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<think>", "</think>"],
    )


def respond(tokenizer: PreTrainedTokenizerFast, text: str, *kept: str) -> Sample:
    ids = tokenizer.encode(text, add_special_tokens=False)
    decode = ResponseDecoder(tokenizer, {tokenizer.eos_token_id, tokenizer.pad_token_id}, kept)
    shown, special = decode(ids)
    return Sample(Prompt([1], answer="7"), ids, [0.0] * len(ids), response_text=shown, special_tokens=special)


RESPONSE = "<think>é so</think> <|call|>7<|end|><|pad|>"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("</think>", 1.0),
        (r"(?s)<think>.*</think>", 1.0),
        (r"<\/think\>\s*7", 1.0),
        (r"</?think>", 1.0),
        (r"(?i)^<THINK>.+</THINK> 7$", 1.0),
        (r"<\|call\|>7$", 1.0),
        (r"é so </think>", 0.0),  # a blank stands behind it, not before
        (r"<\|end\|>", 0.0),
        (r"<\|pad\|>", 0.0),
        (r"^é so 7$", 1.0),  # tokens that it does not name are left out
        (r"^[^<]+$", 1.0),
    ],
)
def test_a_pattern_sees_the_special_tokens_it_names(
    tokenizer: PreTrainedTokenizerFast, pattern: str, expected: float
) -> None:
    sample = respond(tokenizer, RESPONSE)
    assert sample.response_text == tokenizer.decode(sample.response_ids, skip_special_tokens=True) == "é so 7"
    assert RegexReward(RegexReward.Config(pattern=pattern))([sample]) == [expected]


def test_the_text_between_named_tokens_is_compared(tokenizer: PreTrainedTokenizerFast) -> None:
    reward = RegexReward(RegexReward.Config(pattern=r"</think>\s*(\d+)", compare=True))
    assert reward([respond(tokenizer, RESPONSE), respond(tokenizer, "7</think>8<|end|>")]) == [1.0, 0.0]


def test_tokens_kept_by_choice_stand_in_the_text_of_every_reward(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = respond(tokenizer, RESPONSE, "</think>")
    assert sample.response_text == "é so</think> 7"
    assert [token for _, token in sample.special_tokens] == ["<think>", "<|call|>"]
    assert sample.text_with(lambda token: True) == "<think>é so</think> <|call|>7"


@pytest.mark.parametrize("name", ["<|end|>", "<|pad|>", "</thinking>"])
def test_what_cannot_be_kept_is_refused(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    with pytest.raises(ConfigError, match=r"special_tokens names .*expected special tokens .*</think>"):
        respond(tokenizer, "x", name)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("a", False),
        (r".*<\w+>.*", False),
        (r"</?(think|answer)>", True),
        (r"(?P<x></think>)", True),
        (r"(?:<think>)?x</think", False),
        (r"<|/think>", False),
    ],
)
def test_names(pattern: str, named: bool) -> None:
    assert TokenNames(re.compile(pattern))("</think>") is named
