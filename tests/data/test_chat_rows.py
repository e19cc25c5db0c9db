"""Chat rows of every source, tools, messages without content, one BOS, and text that is none."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from chat_tokenizer import NO_CONTENT, TEXT_CONTENT, chat_tokenizer

from megatron_rl.batch import Prompt, Sample
from megatron_rl.data import CompletionDataset, DataError, LabelledDataset, PairDataset, PromptDataset
from megatron_rl.workers.model_reward import RewardTokenizer


def function(name: str, **properties: str) -> dict:
    typed = {key: {"type": kind} for key, kind in properties.items()}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": typed}}}


CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}],
}
LATER = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}],
}
ROWS = [
    {
        "prompt": [{"role": "user", "content": "Weather?"}, CALL, {"role": "tool", "content": "rain"}],
        "tools": [function("weather", city="string"), function("clock", zone="string")],
        "chosen": [{"role": "assistant", "content": "It rains."}],
        "rejected": [{"role": "assistant", "content": "Sun."}],
    },
    {
        "prompt": [{"role": "user", "content": "Time?"}, LATER, {"role": "tool", "content": "12"}],
        "tools": [function("clock", zone="string")],
        "chosen": [{"role": "assistant", "content": "Noon."}],
        "rejected": [{"role": "assistant", "content": "Night."}],
    },
    {
        "prompt": [{"role": "user", "content": "Hello"}],
        "chosen": [{"role": "assistant", "content": "Hi."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
]  # fmt: skip


def sources(folder: Path) -> dict[str, object]:
    """The same rows in every form that is read."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    files = {name: str(folder / f"rows.{name}") for name in ("jsonl", "json", "parquet")}
    made = datasets.Dataset.from_list(ROWS)
    return files | {"list": ROWS, "datasets": made, "list of datasets": made.to_list()}


def test_every_source_gives_the_tokens_that_transformers_gives_for_json_lines(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    expected = [
        tokenizer.apply_chat_template(
            row["prompt"], tools=row.get("tools"), add_generation_prompt=True, return_dict=False
        )
        for row in ROWS
    ]
    assert "zone" not in tokenizer.decode(expected[0]).partition("clock")[0]
    for name, source in sources(tmp_path).items():
        assert [prompt.token_ids for prompt in PromptDataset(source, tokenizer)] == expected, name
        pairs = list(PairDataset(source, tokenizer))
        assert [pair.prompt_ids for pair in pairs] == expected, name
        assert [tokenizer.decode(pair.chosen_ids) for pair in pairs] == ["It rains.</>", "Noon.</>", "Hi.</>"], name
        labelled = list(LabelledDataset(source, tokenizer))
        assert [item.prompt_ids for item in labelled[::2]] == expected, name


def test_a_conversation_may_end_with_a_tool_call() -> None:
    tokenizer = chat_tokenizer()
    row = {"messages": [{"role": "user", "content": "Weather?"}, CALL], "tools": json.dumps(ROWS[0]["tools"])}
    (item,) = CompletionDataset([row], tokenizer)
    assert tokenizer.decode(item.completion_ids) == json.dumps(CALL["tool_calls"]) + "</>"
    assert '<tools>{"type": "function", "function": {"name": "weather"' in tokenizer.decode(item.prompt_ids)


@pytest.mark.parametrize(
    "content", [[{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}], ["Hi ", "you"]]
)
def test_content_in_parts_is_their_text(content: list) -> None:
    (prompt,) = PromptDataset([{"prompt": [{"role": "user", "content": content}]}], chat_tokenizer())
    assert prompt.text == "<s><user>Hi you</><assistant>"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "image", "image": "a.png"}], "has a part 'image': only text can be used"),
        ([5], "has a part 'int'"),
        ({"text": "hi"}, "content is dict {'text': 'hi'}, expected text"),
        (5, "content is int 5, expected text"),
        (None, "expected a string or a list of chat messages, each with a role and a content"),
    ],
)
def test_content_that_is_no_text_is_refused_with_its_row(content: object, expected: str) -> None:
    rows = [{"prompt": "fine"}, {"prompt": [{"role": "user", "content": content}]}]
    with pytest.raises(DataError) as caught:
        PromptDataset(rows, chat_tokenizer())
    assert expected in str(caught.value)
    assert "record 1" in str(caught.value)


@pytest.mark.parametrize("message", [CALL, CALL | {"content": None}])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (NO_CONTENT, "<user>Q</><call>" + json.dumps(CALL["tool_calls"]) + "</>"),
        (TEXT_CONTENT, "<user>Q<assistant>"),
    ],
)
def test_a_message_without_content_takes_the_form_that_the_template_knows(
    message: dict, template: str, expected: str
) -> None:
    rows = [{"prompt": [{"role": "user", "content": "Q"}, message]}]
    assert PromptDataset(rows, chat_tokenizer(template))[0].text == expected


@pytest.mark.parametrize("tools", ["a hammer", 5, ["hammer"]])
def test_tools_that_are_none_are_refused(tools: object) -> None:
    with pytest.raises(DataError, match="record 0: column 'tools' is"):
        PromptDataset([{"prompt": [{"role": "user", "content": "Q"}], "tools": tools}], chat_tokenizer())
    assert PromptDataset([{"prompt": "Q", "tools": tools}], chat_tokenizer())[0].metadata == {"tools": tools}


@pytest.mark.parametrize("ends", [False, True])
def test_every_sequence_begins_with_one_bos(ends: bool) -> None:
    tokenizer = chat_tokenizer(ends=ends)
    chat = [{"role": "user", "content": "hi"}]
    for given in ("<s>hi", "<s><s>hi", "hi", chat):
        (prompt,) = PromptDataset([{"prompt": given}], tokenizer)
        (pair,) = PairDataset([{"prompt": given, "chosen": " yes", "rejected": " no"}], tokenizer)
        (item,) = CompletionDataset([{"prompt": given, "completion": " yes"}], tokenizer)
        for ids in (prompt.token_ids, pair.prompt_ids, item.prompt_ids):
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1
            assert tokenizer.eos_token_id not in ids
        if isinstance(given, str):
            assert (pair.chosen_ids, pair.rejected_ids) == tuple(
                [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in (" yes", " no")
            )
            assert item.completion_ids == pair.chosen_ids
        sample = Sample(Prompt(prompt.token_ids, prompt.text), [], [], response_text="ok")
        answer = tokenizer.encode("ok", add_special_tokens=False)
        assert RewardTokenizer(tokenizer, None).token_ids(sample) == [
            *prompt.token_ids,
            *answer,
            tokenizer.eos_token_id,
        ]


@pytest.mark.parametrize("row", [
    {"prompt": "a\ud800b", "chosen": "x", "rejected": "y", "completion": "x"},
    {"prompt": [{"role": "user", "content": "a\ud800b"}], "chosen": "x", "rejected": "y", "completion": "x"},
    {"prompt": "a", "chosen": "x\udc00", "rejected": "y", "completion": "x\udc00"},
])  # fmt: skip
def test_half_a_character_is_one_clear_error(row: dict) -> None:
    fine = {"prompt": "a", "chosen": "x", "rejected": "y", "completion": "x"}
    kinds = [PairDataset, CompletionDataset] + ([PromptDataset] if row["prompt"] != "a" else [])
    for kind in kinds:
        with pytest.raises(DataError, match=r"record 1: the text has a lone surrogate '\\ud[8c]00'"):
            kind([fine, row], chat_tokenizer())
