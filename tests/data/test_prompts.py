"""Prompts: columns, templates, chat, length limits; on a toy tokenizer and on a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_rows import gsm8k_rows, write_gz
from toy_tokenizer import ToyTokenizer, ids

from megatron_rl.data import DataError, PromptDataset

Config = PromptDataset.Config


def test_plain_prompts_keep_their_row_and_all_columns() -> None:
    rows = [{"question": "1+1=", "answer": 2, "level": "easy"}, {"question": "2+2=", "answer": 4, "level": "hard"}]
    dataset = PromptDataset(rows, ToyTokenizer(), Config(prompt="question"))
    assert len(dataset) == 2
    prompt = dataset[1]
    assert prompt.token_ids == ids("2+2=", bos=True)
    assert (prompt.text, prompt.answer, prompt.metadata, prompt.index) == ("2+2=", 4, {"level": "hard"}, 1)


def test_template_surrounds_the_prompt_and_leaves_braces_alone() -> None:
    dataset = PromptDataset([{"prompt": "{x}"}], ToyTokenizer(), Config(template="Q: {prompt} {}\nA:"))
    assert dataset[0].text == "Q: {x} {}\nA:"


def test_messages_go_through_the_chat_template_once() -> None:
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}]
    (prompt,) = PromptDataset(rows, ToyTokenizer())
    assert prompt.text == "<user>hi</><assistant>"
    assert prompt.token_ids == ids("<user>hi</><assistant>")  # no second BOS: the template's text is complete


def test_chat_wraps_plain_text_and_system_is_added_where_there_is_none() -> None:
    dataset = PromptDataset([{"prompt": "hi"}], ToyTokenizer(), Config(chat=True, system="be kind"))
    assert dataset[0].text == "<system>be kind</><user>hi</><assistant>"
    own = [{"prompt": [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]}]
    assert (
        PromptDataset(own, ToyTokenizer(), Config(system="be kind"))[0].text == "<system>own</><user>hi</><assistant>"
    )


def test_long_prompts_are_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "x" * n} for n in (3, 9, 4, 9)]
    dataset = PromptDataset(rows, ToyTokenizer(), Config(max_prompt_tokens=5))
    assert [(p.text, p.index) for p in dataset] == [("xxx", 0), ("xxxx", 2)]
    assert dict(dataset.skipped) == {"longer than 5 tokens": 2}
    assert "2 of 4 rows skipped: 2 longer than 5 tokens" in caplog.text


@pytest.mark.parametrize(
    ("rows", "config", "expected"),
    [
        ([{"question": "x"}], Config(), "no column 'prompt'; it has question"),
        ([{"prompt": "x"}], Config(answer="answer"), "no column 'answer'"),
        (
            [{"prompt": "xxxx"}],
            Config(max_prompt_tokens=2, overlong="error"),
            "5 tokens, more than max_prompt",
        ),
        ([{"prompt": "xxxx"}], Config(max_prompt_tokens=2), "none of 1 rows is left: 1 longer than 2 tokens"),
        ([{"prompt": 5}], Config(), "record 0: column 'prompt' is int 5, expected a string or a list"),
        ([{"prompt": [{"role": "user"}]}], Config(), "expected a string or a list of chat messages"),
        ([{"prompt": []}], Config(), "expected a string or a list of chat messages"),
        ([{"prompt": "x"}], Config(template="Q:"), "has no {prompt}"),
        ([], Config(), "has no rows"),
        (None, Config(), "set the path of a data file"),
        ([{"prompt": "x"}, {"other": "y"}], Config(), "record 1 has no 'prompt'"),
    ],
)
def test_unusable_data_is_one_clear_error(rows: list | None, config: Config, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        PromptDataset(rows, ToyTokenizer(), config)
    assert expected in str(caught.value)


def test_a_prompt_without_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="the prompt has no tokens"):
        PromptDataset([{"prompt": ""}], ToyTokenizer(bos=False))


def test_shards_partition_the_data_in_order() -> None:
    dataset = PromptDataset([{"prompt": str(n)} for n in range(10)], ToyTokenizer())
    shards = [dataset.shard(rank, 3) for rank in range(3)]
    assert [len(s) for s in shards] == [4, 3, 3]
    assert sorted(p.index for shard in shards for p in shard) == list(range(10))


def test_real_tokenizer_with_and_without_chat_template(llama_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    text = "Once upon a time, Lily"
    plain = PromptDataset([{"prompt": text}], tokenizer)[0]
    assert plain.token_ids == tokenizer(text)["input_ids"]
    assert tokenizer.decode(plain.token_ids, skip_special_tokens=True) == text
    with pytest.raises(DataError, match="cannot render messages with roles user"):
        PromptDataset([{"prompt": [{"role": "user", "content": text}]}], tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = PromptDataset([{"prompt": [{"role": "user", "content": text}]}], tokenizer)[0]
    reference = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    assert chat.token_ids == list(reference["input_ids"])
    assert chat.token_ids.count(tokenizer.bos_token_id) == 1


def test_rows_in_gsm8k_s_form_load_from_a_compressed_file(tmp_path: Path) -> None:
    rows = gsm8k_rows(30)
    config = Config(path=str(write_gz(tmp_path / "rows.jsonl.gz", rows)), prompt="question")
    dataset = PromptDataset(None, ToyTokenizer(), config)
    assert [prompt.text for prompt in dataset] == [row["question"] for row in rows]
    assert [prompt.answer for prompt in dataset] == [row["answer"] for row in rows]
    assert dataset[7].token_ids == ids(rows[7]["question"], bos=True)


def test_gsm8k_loads_whole(shared_dir: Path) -> None:
    config = Config(path=str(shared_dir / "data" / "gsm8k_test.jsonl.gz"), prompt="question")
    dataset = PromptDataset(None, ToyTokenizer(), config)
    assert len(dataset) + sum(dataset.skipped.values()) == 1319
    assert "####" in dataset[0].answer
