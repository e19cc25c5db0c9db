"""Pairs, completions and labels: forms of rows, prompt extraction, tokens, limits, and what is skipped or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_rows import preference_rows, write_gz
from replica import replica
from toy_tokenizer import EOS, ToyTokenizer, ids

from megatron_rl.data import (
    CompletionDataset,
    CompletionLoader,
    DataError,
    LabelledDataset,
    PairDataset,
    PairLoader,
    PromptDataset,
    pack_completions,
    pack_pairs,
)
from megatron_rl.data.preferences import extract_prompt
from megatron_rl.data.text import encode_completions

USER = {"role": "user", "content": "hi"}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


PAIR = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}


def test_plain_pair_has_bos_at_the_front_and_eos_at_both_ends() -> None:
    (pair,) = PairDataset([PAIR | {"source": "hh"}], ToyTokenizer())
    assert pair.prompt_ids == ids("Q:", bos=True)
    assert pair.chosen_ids == ids(" yes", eos=True)
    assert pair.rejected_ids == ids(" no", eos=True)
    assert (pair.metadata, pair.index, pair.margin) == ({"source": "hh"}, 0, 0.0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]},
        {"prompt": "hi", "chosen": [says("yes")], "rejected": [says("no")]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"chosen": [USER, says("yes")], "rejected": [USER, says("no")]},
    ],
)
def test_all_forms_of_a_chat_pair_give_the_same_tokens(row: dict) -> None:
    (pair,) = PairDataset([row], ToyTokenizer())
    assert pair.prompt_ids == ids("<user>hi</><assistant>")
    assert pair.chosen_ids == ids("yes</>")
    assert pair.rejected_ids == ids("no</>")


def test_text_that_only_an_open_turn_has_belongs_to_no_prompt() -> None:
    class Thinking(ToyTokenizer):
        def apply_chat_template(self, messages: list, /, *, tokenize: bool, add_generation_prompt: bool) -> str:
            text = super().apply_chat_template(messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt)
            return text + "<think>" * add_generation_prompt

    prompt, (answer,) = encode_completions([USER], [[says("<b>yes")]], Thinking())
    assert prompt == ids("<user>hi</><assistant><")
    assert answer == ids("b>yes</>")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Human: hi\n\nAssistant: yes", "Human: hi\n\nAssistant: no", ("Human: hi\n\nAssistant:", " yes", " no")),
        ("to be yes", "to be yep", ("to be", " yes", " yep")),
        ("a b", "ab", None),
        ("yes", "no", None),
        ("", "x", None),
        ([USER, says("a")], [USER, says("b")], ([USER], [says("a")], [says("b")])),
        ([says("a")], [says("b")], None),
        ([USER, says("a")], "hi a", None),
    ],
)
def test_implicit_prompt(chosen: object, rejected: object, expected: object) -> None:
    assert extract_prompt(chosen, rejected) == expected  # type: ignore[arg-type]


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=6), st.text("ab \n", max_size=6))
def test_extracted_parts_join_to_the_originals(prompt: str, chosen: str, rejected: str) -> None:
    found = extract_prompt(prompt + chosen, prompt + rejected)
    if found is not None:
        start, good, bad = found
        assert start
        assert good
        assert bad
        assert start + good == prompt + chosen
        assert start + bad == prompt + rejected


def test_equal_and_empty_completions_are_skipped_and_counted() -> None:
    class NoEos(ToyTokenizer):
        eos_token_id = None

    rows = [PAIR, PAIR | {"rejected": " yes"}, PAIR | {"chosen": ""}]
    dataset = PairDataset(rows, NoEos())
    assert [p.index for p in dataset] == [0]
    assert dict(dataset.skipped) == {"chosen equal to rejected": 1, "empty completion": 1}


def limited(overlong: str, prompt: str, chosen: str, rejected: str, **limits: int) -> PairDataset:
    rows = [PAIR, {"prompt": prompt, "chosen": chosen, "rejected": rejected}]
    return PairDataset(rows, ToyTokenizer(), PairDataset.Config(overlong=overlong, **limits))  # type: ignore[arg-type]


def test_long_pairs_are_skipped_cut_or_refused_as_configured() -> None:
    long = ("0123456", "abcd", "xy")  # 8 prompt tokens, 5 and 3 completion tokens
    assert dict(limited("skip", *long, max_length=12).skipped) == {"too long": 1}
    assert len(limited("skip", *long, max_length=13)) == 2
    cut = limited("truncate_prompt", *long, max_length=10)[1]
    assert (cut.prompt_ids, cut.chosen_ids, cut.rejected_ids) == (
        ids("23456"),
        ids("abcd", eos=True),
        ids("xy", eos=True),
    )
    cut = limited("truncate_completion", *long, max_length=10)[1]
    assert (cut.prompt_ids, cut.chosen_ids, cut.rejected_ids) == (ids("0123456", bos=True), ids("ab"), ids("xy"))
    with pytest.raises(DataError, match=r"record 1: prompt of 8 and completion of 5 tokens exceed max_length=12"):
        limited("error", *long, max_length=12)


def test_truncation_that_leaves_nothing_to_compare_is_a_counted_skip() -> None:
    same = (
        "Q:",
        "same then other",
        "same then more",
    )
    assert dict(limited("truncate_completion", *same, max_length=8).skipped) == {
        "chosen equal to rejected after truncation": 1
    }
    assert dict(limited("truncate_completion", "x" * 20, "a", "b", max_length=8).skipped) == {"prompt too long": 1}
    assert dict(limited("truncate_completion", "x" * 5, "a", "b", max_length=9, max_prompt_tokens=4).skipped) == {
        "prompt too long": 1
    }
    kept = limited("truncate_prompt", "0123456", "a" * 20, "b" * 20, max_length=8)[1]
    assert (kept.prompt_ids, kept.chosen_ids) == (ids("6"), ids("a" * 7))


def test_margins_are_read_and_checked() -> None:
    config = PairDataset.Config(margin="gap")
    assert PairDataset([PAIR | {"gap": 2}], ToyTokenizer(), config)[0].margin == 2.0
    with pytest.raises(DataError, match="column 'gap' is 'much', expected a number"):
        PairDataset([PAIR | {"gap": "much"}], ToyTokenizer(), config)


@pytest.mark.parametrize(
    ("rows", "config", "expected"),
    [
        ([{"prompt": "x", "chosen": "y"}], {}, "no column 'rejected'; it has prompt, chosen"),
        ([{"chosen": "y z", "rejected": "y a"}], {"prompt": "prompt"}, "no column 'prompt'; it has chosen, rejected"),
        ([{"chosen": "yes", "rejected": "no"}], {}, "begin with nothing in common"),
        ([{"prompt": "x", "chosen": 1, "rejected": "y"}], {}, "column 'chosen' is int 1"),
        ([PAIR | {"rejected": " yes"}], {}, "none of 1 rows is left: 1 chosen equal to rejected"),
    ],
)
def test_unusable_pairs_are_one_clear_error(rows: list, config: dict, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        PairDataset(rows, ToyTokenizer(), PairDataset.Config(**config))
    assert expected in str(caught.value)


def test_a_prompt_without_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="the prompt has no tokens"):
        PairDataset([PAIR | {"prompt": ""}], ToyTokenizer(bos=False))


def test_packed_pairs_are_neighbours() -> None:
    pairs = PairDataset([PAIR, {"prompt": "R", "chosen": "a", "rejected": "bc"}], ToyTokenizer())
    batch = pack_pairs(list(pairs))
    assert batch.num_sequences == 4
    assert batch["groups"].tolist() == [0, 0, 1, 1]
    assert batch["labels"].tolist() == [True, False, True, False]
    assert batch["margins"].tolist() == [0.0] * 4
    starts = batch.cu_seqlens.tolist()
    third = slice(starts[2], starts[3])
    assert batch["input_ids"][third].tolist() == ids("Ra", bos=True, eos=True)
    assert batch["response_mask"][third].tolist() == [False, False, True, True]


def test_labelled_completions() -> None:
    rows = [{"prompt": "Q:", "completion": " a", "label": True}, {"prompt": "Q:", "completion": " b", "label": 0}]
    dataset = LabelledDataset(rows, ToyTokenizer())
    assert [(c.completion_ids, c.label, c.metadata) for c in dataset] == [
        (ids(" a", eos=True), True, {}),
        (ids(" b", eos=True), False, {}),
    ]
    assert pack_completions(list(dataset))["labels"].tolist() == [True, False]


def test_pairs_serve_as_labelled_completions() -> None:
    dataset = LabelledDataset([PAIR, PAIR | {"rejected": " yes"}], ToyTokenizer())
    assert [(c.completion_ids, c.label) for c in dataset] == [
        (ids(" yes", eos=True), True),
        (ids(" no", eos=True), False),
    ]
    assert dict(dataset.skipped) == {"chosen equal to rejected": 1}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "x", "completion": "y"}], "no column 'label'; it has prompt, completion"),
        ([{"prompt": "x", "completion": "y", "label": "good"}], "column 'label' is 'good', expected true/false or 1/0"),
        ([{"prompt": "x", "completion": "y", "label": 2}], "column 'label' is 2, expected true/false or 1/0"),
        ([{"prompt": "x", "completion": "y", "label": True}] * 3, "all 3 labels are True"),
    ],
)
def test_unusable_labels_are_one_clear_error(rows: list, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        LabelledDataset(rows, ToyTokenizer())
    assert expected in str(caught.value)


def test_one_class_may_be_allowed() -> None:
    rows = [{"prompt": "x", "completion": "y", "label": True}]
    assert len(LabelledDataset(rows, ToyTokenizer(), LabelledDataset.Config(allow_one_class=True))) == 1


def test_supervised_completions_from_columns_or_conversations() -> None:
    columns = [{"prompt": [USER], "completion": "yes"}]
    conversation = [{"messages": [USER, says("yes")]}]
    for rows in (columns, conversation):
        (item,) = CompletionDataset(rows, ToyTokenizer())
        assert (item.prompt_ids, item.completion_ids) == (ids("<user>hi</><assistant>"), ids("yes</>"))
    assert "labels" not in pack_completions(list(CompletionDataset(columns, ToyTokenizer())))
    with pytest.raises(DataError, match="end with the assistant's answer"):
        CompletionDataset([{"messages": [USER]}], ToyTokenizer())


def test_a_tokenizer_that_marks_word_beginnings_puts_no_mark_into_the_seam() -> None:
    class Marking(ToyTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return super().encode("_" + text, add_special_tokens=add_special_tokens)

    (pair,) = PairDataset([PAIR], Marking())
    assert (pair.prompt_ids, pair.chosen_ids) == (ids("_Q:", bos=True), ids(" yes", eos=True))


def test_a_seam_that_would_merge_is_tokenised_apart() -> None:
    class Merging(ToyTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text.replace(": ", "%"), add_special_tokens=add_special_tokens)

    (pair,) = PairDataset([PAIR], Merging())
    assert (pair.prompt_ids, pair.chosen_ids) == (ids("Q:", bos=True), ids(" yes", eos=True))


def test_real_tokenizer_puts_no_space_into_the_seam(llama_folder: Path) -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(llama_folder)
    row = {"prompt": "Once upon a time", "chosen": ", there was a girl.", "rejected": " Tim ran."}
    (pair,) = PairDataset([row], tokenizer)
    for completion, text in ((pair.chosen_ids, row["chosen"]), (pair.rejected_ids, row["rejected"])):
        assert completion[-1] == tokenizer.eos_token_id
        whole = tokenizer.decode(pair.prompt_ids + completion[:-1], skip_special_tokens=True)
        assert whole == row["prompt"] + text
    assert pair.prompt_ids == PromptDataset([row], tokenizer)[0].token_ids  # as a rollout would see it


def test_rows_in_hh_s_form_load_from_a_compressed_file(tmp_path: Path) -> None:
    rows = preference_rows(30)
    dataset = PairDataset(
        write_gz(tmp_path / "rows.jsonl.gz", rows), ToyTokenizer(), PairDataset.Config(max_length=4096)
    )
    assert len(dataset) == 30
    for pair, row in zip(dataset, rows, strict=True):
        assert pair.prompt_ids == ids(row["prompt"], bos=True)
        assert pair.chosen_ids == ids(row["chosen"], eos=True)
        assert pair.rejected_ids == ids(row["rejected"], eos=True)


def test_real_pairs_load_whole(shared_dir: Path) -> None:
    path = shared_dir / "data" / "hh_harmless_test_pairs.jsonl.gz"
    dataset = PairDataset(path, ToyTokenizer(), PairDataset.Config(max_length=4096))
    assert len(dataset) + sum(dataset.skipped.values()) == 2308
    assert len(dataset) > 2200
    assert all(pair.chosen_ids[-1] == pair.rejected_ids[-1] == EOS for pair in dataset)


def test_loaders_give_packed_batches_of_this_rank() -> None:
    pairs = PairDataset([PAIR | {"prompt": f"{n}:"} for n in range(4)], ToyTokenizer())
    batch = PairLoader(pairs, 4, replica(1, 2), shuffle=False).next_batch()
    assert batch["input_ids"].tolist() == pack_pairs(pairs.items[2:])["input_ids"].tolist()
    answers = CompletionDataset([{"prompt": f"{n}:", "completion": "x"} for n in range(4)], ToyTokenizer())
    batch = CompletionLoader(answers, 2, replica(1, 2), shuffle=False).next_batch()
    assert batch["input_ids"].tolist() == ids("1:x", bos=True, eos=True)
