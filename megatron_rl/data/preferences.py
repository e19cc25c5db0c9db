"""`PairDataset`: a prompt with a chosen and a rejected completion, for DPO and its kin and for reward models.

Rows may be plain text or messages; without a prompt column, the common prefix of chosen and rejected is the prompt (as
in TRL's `extract_prompt`).
"""

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
from megatron_rl.data.records import DataError, Records
from megatron_rl.data.text import Text, Tokenizer, check_text, common_prefix, encode_completions


@dataclass(slots=True)
class PreferencePair:
    """One prompt, the better and the worse answer."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float = 0.0  # how much better, where the data says so
    metadata: dict[str, Any] = field(default_factory=dict)  # every other column of the row
    index: int = 0  # number of the row in the source


class PairDataset(TokenisedDataset[PreferencePair, "PairDataset.Config"]):
    """Pairs in the order of their rows. Skipped and counted: chosen equal to rejected, empty completions, too long.

    Args:
        source: a path or glob pattern, a `datasets.Dataset` or a list of dicts; None means ``config.path``. The chat
            template gets the row's ``tools``.
        limits: of the model: no row may be longer than its context.
    """

    class Config(LengthConfig):
        """Columns and limits."""

        prompt: str = "prompt"
        """Column with the prompt; data without it has the prompt at the beginning of both completions."""
        chosen: str = "chosen"
        """Column with the better completion."""
        rejected: str = "rejected"
        """Column with the worse completion."""
        margin: str = ""
        """Column with a number that says how much better; empty means none."""

    def __init__(
        self, source: Any, tokenizer: Tokenizer, config: Config | None = None, limits: Limits | None = None
    ) -> None:
        super().__init__(source, tokenizer, config or self.Config(), limits)

    def token_rows(self, item: PreferencePair) -> list[list[int]]:
        return [item.prompt_ids, item.chosen_ids, item.rejected_ids]

    def truth(self, item: PreferencePair) -> object:
        return item.margin

    def prepare(self, records: Records) -> None:
        config = self.config
        records.require(config.chosen, config.rejected, *([config.margin] if config.margin else []))
        if "prompt" in config.model_fields_set:
            records.require(config.prompt)

    def convert(self, records: Records, index: int) -> list[PreferencePair]:
        config, place, row = self.config, records.places[index], records.rows[index]
        prompt, chosen, rejected = read_pair(records, index, config.prompt, config.chosen, config.rejected)
        if chosen == rejected:
            raise SkipRowError("chosen equal to rejected")
        tools = None if all(isinstance(text, str) for text in (prompt, chosen, rejected)) else read_tools(row, place)
        prompt_ids, completions = encode_completions(prompt, [chosen, rejected], self.tokenizer, tools)
        check_tokens(place, prompt_ids, *completions)
        prompt_ids, (chosen_ids, rejected_ids) = fit(prompt_ids, completions, config, place, self.limits.context)
        if chosen_ids == rejected_ids:
            raise SkipRowError("chosen equal to rejected after truncation")
        margin = _number(records.value(index, config.margin), place, config.margin) if config.margin else 0.0
        used = (config.prompt, config.chosen, config.rejected, config.margin)
        metadata = {name: value for name, value in row.items() if name not in used}
        return [PreferencePair(prompt_ids, chosen_ids, rejected_ids, margin, metadata, index)]


def read_pair(records: Records, index: int, prompt: str, chosen: str, rejected: str) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected of one row, the prompt extracted where the data has no such column.

    Raises:
        DataError: a cell is missing or neither text nor messages, or no prompt can be extracted.
    """
    place = records.places[index]
    columns = [prompt, chosen, rejected] if prompt in records.columns else [chosen, rejected]
    texts = [check_text(records.value(index, column), f"{place}: column {column!r}") for column in columns]
    if len(texts) == 3:
        return texts[0], texts[1], texts[2]
    found = extract_prompt(texts[0], texts[1])
    if found is None:
        raise DataError(
            f"{place} has no column {prompt!r}, and chosen and rejected begin with nothing in common that could be the "
            "prompt: add the column, or let both completions begin with the prompt"
        )
    return found


def extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text] | None:
    """(prompt, chosen, rejected) from completions that both begin with the prompt; None when they share nothing.

    Texts are cut before the last white space that they share, so that no word is cut in two. Of equal completions the
    last message, or the last word, is the completion.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        return None
    shared = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if isinstance(chosen, str):
        while shared > 0 and not (chosen[shared].isspace() and rejected[shared].isspace()):  # type: ignore[union-attr]
            shared -= 1
    if shared <= 0:
        return None
    return chosen[:shared], chosen[shared:], rejected[shared:]


def pack_pairs(pairs: Sequence[PreferencePair]) -> Batch:
    """Pairs as a `Batch`: chosen and rejected of a pair are neighbours, sequences 2 i and 2 i + 1.

    Besides ``input_ids`` and ``response_mask``: ``groups`` int64, the number of the pair; ``labels`` bool, True for
    chosen; ``margins`` fp32.
    """
    rows, masks = [], []
    for pair in pairs:
        for completion in (pair.chosen_ids, pair.rejected_ids):
            rows.append(pair.prompt_ids + completion)
            masks.append([0] * len(pair.prompt_ids) + [1] * len(completion))
    batch = Batch.from_sequences(rows, masks)
    batch.sequences["groups"] = torch.arange(len(pairs)).repeat_interleave(2)
    batch.sequences["labels"] = torch.tensor([True, False]).repeat(len(pairs))
    batch.sequences["margins"] = torch.tensor([p.margin for p in pairs], dtype=torch.float32).repeat_interleave(2)
    return batch


class PairLoader(GlobalBatchLoader[PreferencePair]):
    """Pairs for the training loop."""

    def next_batch(self) -> Batch:
        """This rank's next pairs, packed."""
        return pack_pairs(next(self))


def check_tokens(place: str, prompt_ids: list[int], *completions: list[int]) -> None:
    """A prompt needs a token for the completion's first to be predicted from; a completion needs one to train on.

    Raises:
        DataError: the prompt has none.
        SkipRowError: a completion has none.
    """
    if not prompt_ids:
        raise DataError(
            f"{place}: the prompt has no tokens, and this tokenizer adds none; a completion needs one before it"
        )
    if not all(completions):
        raise SkipRowError("empty completion")


def _number(value: Any, place: str, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{place}: column {column!r} is {value!r}, expected a number")
    return float(value)
