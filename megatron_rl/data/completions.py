"""`CompletionDataset`: prompts with one answer each, for SFT; `LabelledDataset`: labelled good or bad, for KTO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_rl.batch import Batch
from megatron_rl.data.dataset import Limits, SkipRowError, TokenisedDataset
from megatron_rl.data.length import LengthConfig, fit
from megatron_rl.data.loader import GlobalBatchLoader
from megatron_rl.data.messages import read_tools
from megatron_rl.data.preferences import check_tokens, read_pair
from megatron_rl.data.records import DataError, Records
from megatron_rl.data.text import Text, Tokenizer, check_text, encode_completions


@dataclass(slots=True)
class PromptCompletion:
    """One prompt and one answer."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool | None = None  # desirable or not; None where the data does not say
    metadata: dict[str, Any] = field(default_factory=dict)  # every other column of the row
    index: int = 0  # number of the row in the source


class CompletionDataset(TokenisedDataset[PromptCompletion, Any]):
    """Completions in the order of their rows: columns prompt and completion, or messages that end with the assistant's.

    Args:
        source: a path or glob pattern, a `datasets.Dataset` or a list of dicts; None means ``config.path``. The chat
            template gets the row's ``tools``.
        limits: of the model: no row may be longer than its context.
    """

    class Config(LengthConfig):
        """Columns and limits."""

        prompt: str = "prompt"
        """Column with the prompt."""
        completion: str = "completion"
        """Column with the completion."""
        messages: str = "messages"
        """Column with a whole conversation, where there is no completion column; its last message is trained on."""

    def __init__(
        self, source: Any, tokenizer: Tokenizer, config: Config | None = None, limits: Limits | None = None
    ) -> None:
        config = config or self.Config()
        self.columns = {config.prompt, config.completion, config.messages}  # all others become metadata
        super().__init__(source, tokenizer, config, limits)

    def token_rows(self, item: PromptCompletion) -> list[list[int]]:
        return [item.prompt_ids, item.completion_ids]

    def truth(self, item: PromptCompletion) -> object:
        return item.label

    def prepare(self, records: Records) -> None:
        self.conversations = self.config.completion not in records.columns and self.config.messages in records.columns
        if not self.conversations:
            records.require(self.config.prompt, self.config.completion)

    def convert(self, records: Records, index: int) -> list[PromptCompletion]:
        config, place = self.config, records.places[index]
        if self.conversations:
            prompt, completion = split_conversation(records.value(index, config.messages), place)
        else:
            columns = (config.prompt, config.completion)
            prompt, completion = (check_text(records.value(index, c), f"{place}: column {c!r}") for c in columns)
        return [self.encode(records, index, prompt, completion)]

    def encode(
        self, records: Records, index: int, prompt: Text, completion: Text, label: bool | None = None
    ) -> PromptCompletion:
        """One record from texts."""
        place = records.places[index]
        tools = (
            read_tools(records.rows[index], place) if isinstance(prompt, list) or isinstance(completion, list) else None
        )
        prompt_ids, (completion_ids,) = encode_completions(prompt, [completion], self.tokenizer, tools)
        check_tokens(place, prompt_ids, completion_ids)
        prompt_ids, (completion_ids,) = fit(prompt_ids, [completion_ids], self.config, place, self.limits.context)
        metadata = {name: value for name, value in records.rows[index].items() if name not in self.columns}
        return PromptCompletion(prompt_ids, completion_ids, label, metadata, index)


class LabelledDataset(CompletionDataset):
    """Completions with labels. Pairs (columns chosen and rejected) are taken as one good and one bad completion each.

    Raises:
        DataError: a label is not true/false or 1/0; or all labels are the same, unless ``allow_one_class``.
    """

    class Config(CompletionDataset.Config):
        """Columns and limits."""

        label: str = "label"
        """Column that says whether the completion is desirable: true/false or 1/0."""
        chosen: str = "chosen"
        """Column with the good completion of a pair."""
        rejected: str = "rejected"
        """Column with the bad completion of a pair."""
        allow_one_class: bool = False
        """Accept data whose labels are all the same; KTO then has nothing to contrast."""

    def __init__(
        self, source: Any, tokenizer: Tokenizer, config: Config | None = None, limits: Limits | None = None
    ) -> None:
        super().__init__(source, tokenizer, config or self.Config(), limits)
        labels = {item.label for item in self.items}
        if len(labels) == 1 and not self.config.allow_one_class:
            raise DataError(
                f"all {len(self.items)} labels are {labels.pop()}: KTO and BCO need desirable and undesirable "
                "completions; check the label column, or set allow_one_class: true"
            )

    def prepare(self, records: Records) -> None:
        config = self.config
        self.columns |= {config.label, config.chosen, config.rejected}
        self.pairs = config.completion not in records.columns and {config.chosen, config.rejected} <= {*records.columns}
        if not self.pairs:
            records.require(config.prompt, config.completion, config.label)

    def convert(self, records: Records, index: int) -> list[PromptCompletion]:
        config, place = self.config, records.places[index]
        if self.pairs:
            prompt, chosen, rejected = read_pair(records, index, config.prompt, config.chosen, config.rejected)
            if chosen == rejected:
                raise SkipRowError("chosen equal to rejected")
            texts = [(chosen, True), (rejected, False)]
        else:
            columns = (config.prompt, config.completion)
            prompt, completion = (check_text(records.value(index, c), f"{place}: column {c!r}") for c in columns)
            texts = [(completion, _label(records.value(index, config.label), place, config.label))]
        return [self.encode(records, index, prompt, text, label) for text, label in texts]


def split_conversation(messages: Any, place: str) -> tuple[Text, Text]:
    """(everything before, last message) of a conversation that ends with the assistant.

    Raises:
        DataError: it is no conversation, has nothing before its last message, or does not end with the assistant.
    """
    conversation = check_text(messages, place)
    if isinstance(conversation, str) or len(conversation) < 2 or conversation[-1]["role"] != "assistant":
        raise DataError(f"{place}: expected messages that end with the assistant's answer to something")
    return conversation[:-1], conversation[-1:]


def pack_completions(completions: Sequence[PromptCompletion]) -> Batch:
    """Completions as a `Batch`: ``input_ids``, ``response_mask`` and, where every one has a label, ``labels`` bool."""
    rows = [c.prompt_ids + c.completion_ids for c in completions]
    masks = [[0] * len(c.prompt_ids) + [1] * len(c.completion_ids) for c in completions]
    batch = Batch.from_sequences(rows, masks)
    if all(c.label is not None for c in completions):
        batch.sequences["labels"] = torch.tensor([c.label for c in completions], dtype=torch.bool)
    return batch


class CompletionLoader(GlobalBatchLoader[PromptCompletion]):
    """Completions for the training loop."""

    def next_batch(self) -> Batch:
        """This rank's next completions, packed."""
        return pack_completions(next(self))


def _label(value: Any, place: str, column: str) -> bool:
    if value in (0, 1) and isinstance(value, bool | int | float):
        return bool(value)
    raise DataError(f"{place}: column {column!r} is {value!r}, expected true/false or 1/0")
