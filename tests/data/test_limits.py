"""What a model cannot take is refused, or skipped, while data are read: token ids, and lengths beyond its context."""

from __future__ import annotations

import pytest
from toy_tokenizer import ToyTokenizer

from megatron_rl.data import CompletionDataset, DataError, LabelledDataset, Limits, PairDataset, PromptDataset

ROW = {"prompt": "Q:", "chosen": "yes", "rejected": "n", "completion": "yes", "label": True}
KINDS = (PromptDataset, PairDataset, CompletionDataset)
LETTER = ord("z") + 10  # its token id, the largest of these texts


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_above_the_vocabulary_are_refused_with_their_row(kind: type) -> None:
    rows = [ROW, ROW | {"prompt": "Q:z"}]
    kind(rows, ToyTokenizer(), limits=Limits(vocab=LETTER + 1))
    with pytest.raises(DataError, match=f"record 1: token id {LETTER} is outside the model's vocabulary of {LETTER}"):
        kind(rows, ToyTokenizer(), limits=Limits(vocab=LETTER))


@pytest.mark.parametrize(("kind", "column"), [(PairDataset, "rejected"), (CompletionDataset, "completion")])
def test_completions_are_looked_at_too(kind: type, column: str) -> None:
    with pytest.raises(DataError, match=f"token id {LETTER}"):
        kind([ROW, ROW | {column: "z"}], ToyTokenizer(), limits=Limits(vocab=LETTER))


def test_a_prompt_must_leave_room_for_the_longest_answer(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "x" * n} for n in (3, 9, 4, 10)]  # one token more each, for BOS
    dataset = PromptDataset(rows, ToyTokenizer(), limits=Limits(context=16, response=6))
    assert [prompt.index for prompt in dataset] == [0, 1, 2]
    assert "1 longer than the 10 that max_tokens=6 leaves of the model's context of 16" in caplog.text
    with pytest.raises(
        DataError, match=r"record 3: the prompt has 11 tokens, more than the 10 that max_tokens=6 leaves"
    ):
        PromptDataset(rows, ToyTokenizer(), PromptDataset.Config(overlong="error"), Limits(context=16, response=6))
    with pytest.raises(DataError, match=r"max_tokens=16 leaves no room for a prompt in the model's context of 16"):
        PromptDataset(rows, ToyTokenizer(), limits=Limits(context=16, response=16))


@pytest.mark.parametrize("kind", [PairDataset, CompletionDataset, LabelledDataset])
def test_fixed_rows_longer_than_the_context_follow_overlong(kind: type) -> None:
    other = ROW | {"prompt": "x", "chosen": "y" * 20, "completion": "y" * 20, "label": False}
    rows, limits = [ROW, ROW | {"label": False}, other], Limits(context=16)
    skipped = kind(rows, ToyTokenizer(), limits=limits)
    assert len(skipped) == 2
    assert dict(skipped.skipped) == {"longer than the model's context of 16 tokens": 1}
    cut = kind(rows, ToyTokenizer(), kind.Config(overlong="truncate_completion"), limits)
    assert max(sum(map(len, cut.token_rows(item)[:2])) for item in cut) == 16
    with pytest.raises(DataError, match="exceed the model's context of 16"):
        kind(rows, ToyTokenizer(), kind.Config(overlong="error"), limits)


def test_data_made_without_limits_can_be_checked_later() -> None:
    data = PairDataset([ROW, ROW | {"chosen": "y" * 20}], ToyTokenizer())
    data.check(Limits(vocab=LETTER, context=24))
    with pytest.raises(DataError, match="record 1 has 24 tokens, more than the model's context of 23"):
        data.check(Limits(context=23))
    with pytest.raises(DataError, match="record 0: token id 131"):
        data.check(Limits(vocab=131))
    prompts = PromptDataset([{"prompt": "x" * 5}], ToyTokenizer())
    with pytest.raises(DataError, match="has 16 tokens, max_tokens=10 included"):
        prompts.check(Limits(context=15, response=10))


def test_the_digest_tells_data_apart_by_what_is_trained_on() -> None:
    def digest(kind: type, **change: object) -> str:
        return kind([ROW, ROW | change], ToyTokenizer()).digest

    for kind, changes in {
        PromptDataset: [{"prompt": "q:"}, {"answer": 5}, {"answer": "5"}],
        PairDataset: [{"prompt": "q:"}, {"chosen": "yet"}, {"rejected": "m"}],
        CompletionDataset: [{"prompt": "q:"}, {"completion": "yet"}, {"prompt": "Q", "completion": ":yes"}],
    }.items():
        found = [digest(kind), *(digest(kind, **change) for change in changes)]
        assert len(set(found)) == len(found), kind
        assert digest(kind) == digest(kind, note=object()) == found[0]
    swapped = PromptDataset([ROW | {"prompt": "a"}, ROW], ToyTokenizer()).digest
    assert swapped != PromptDataset([ROW, ROW | {"prompt": "a"}], ToyTokenizer()).digest
