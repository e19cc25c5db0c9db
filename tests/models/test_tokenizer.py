"""Pad and eos of tokenizer and model agree, or the user is told how to make them agree."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedTokenizerFast

from megatron_rl.config import ConfigError
from megatron_rl.models.tokenizer import SpecialTokens, align_tokenizer, check_vocabulary, load_tokenizer

WORDS = ["<s>", "</s>", "<pad>", "<end>", "user", "assistant", "hello", "you"]


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(WORDS)}
    inner = Tokenizer(WordLevel(vocab, unk_token="<s>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def config(**fields: object) -> LlamaConfig:
    return LlamaConfig(vocab_size=8, **({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None} | fields))


def test_the_config_follows_the_tokenizer() -> None:
    model = config()
    assert align_tokenizer(tokenizer(eos_token="<end>", pad_token="<pad>"), model) == SpecialTokens(2, (3, 1))
    assert (model.pad_token_id, model.eos_token_id, model.bos_token_id) == (2, [3, 1], 0)


def test_one_agreed_eos_stays_a_number() -> None:
    model = config()
    align_tokenizer(tokenizer(eos_token="</s>", pad_token="<pad>", bos_token="<s>"), model)
    assert model.eos_token_id == 1


def test_the_tokenizer_takes_eos_and_pad_from_the_config_where_it_has_none() -> None:
    words = tokenizer()
    assert align_tokenizer(words, config(pad_token_id=2)) == SpecialTokens(2, (1,))
    assert (words.pad_token, words.eos_token) == ("<pad>", "</s>")


def test_a_tokenizer_without_pad_is_an_error_that_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="pad_token='eos'"):
        align_tokenizer(tokenizer(eos_token="</s>"), config())


@pytest.mark.parametrize(("choice", "expected"), [("eos", 1), ("<pad>", 2)])
def test_a_chosen_pad_is_used(choice: str, expected: int) -> None:
    words = tokenizer(eos_token="</s>")
    assert align_tokenizer(words, config(), pad_token=choice).pad == expected == words.pad_token_id


def test_a_pad_that_would_need_a_new_embedding_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="not in the tokenizer's vocabulary"):
        align_tokenizer(tokenizer(eos_token="</s>"), config(), pad_token="<brand new>")


def test_no_eos_anywhere_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no response would ever end"):
        align_tokenizer(tokenizer(pad_token="<pad>"), config(eos_token_id=None))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    words = tokenizer(eos_token="</s>", pad_token="<pad>")
    with pytest.raises(ConfigError, match="belongs to another model"):
        align_tokenizer(words, LlamaConfig(vocab_size=2, eos_token_id=1))


def test_ids_that_the_model_has_no_rows_for_are_refused_with_a_way_out() -> None:
    words = tokenizer(eos_token="</s>", pad_token="<pad>")
    check_vocabulary(words, 8)
    words.add_tokens(["<think>", "</think>"])
    with pytest.raises(ConfigError, match=r"ids up to 9, .* has 8 rows: .*resize_token_embeddings\(10\)"):
        check_vocabulary(words, 8)


def test_an_id_above_a_gap_is_refused() -> None:
    inner = Tokenizer(WordLevel({"<s>": 0, "far": 40}, unk_token="<s>"))
    with pytest.raises(ConfigError, match=r"ids up to 40, .* has 8 rows"):
        check_vocabulary(PreTrainedTokenizerFast(tokenizer_object=inner), 8)


def test_a_folder_without_tokenizer_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_real_tokenizer_aligns_with_its_model(llama_folder) -> None:
    words = load_tokenizer(llama_folder)
    assert align_tokenizer(words, LlamaConfig.from_pretrained(llama_folder)) == SpecialTokens(0, (1,))
