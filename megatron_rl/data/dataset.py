"""`TokenisedDataset`: rows turned into records of token ids, once, with every skipped row counted by its reason.

Every rank builds the same data set, so that order and indices need no communication. Subclasses say what one row
becomes.
"""

from __future__ import annotations

import hashlib
import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import Field

from megatron_rl.config import ConfigRecord
from megatron_rl.data.records import DataError, Records, read_records
from megatron_rl.data.text import Tokenizer

logger = logging.getLogger(__name__)

ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the repr of objects: differs between processes

T = TypeVar("T")
ConfigT = TypeVar("ConfigT", bound="TokenisedDataset.Config")


class SkipRowError(Exception):
    """Raised while a row is converted: leave it out and count it under ``reason``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the model that will train on the data; None = not known yet."""

    vocab: int | None = None  # every token id is below it
    context: int | None = None  # tokens of a sequence
    response: int = 0  # tokens of the context that are kept free for an answer (max_tokens)

    @property
    def room(self) -> int | None:
        """Longest prompt, in tokens.

        Raises:
            DataError: there is none.
        """
        if self.context is None:
            return None
        if self.response >= self.context:
            raise DataError(
                f"max_tokens={self.response} leaves no room for a prompt in the model's context of {self.context} "
                "tokens: lower max_tokens"
            )
        return self.context - self.response

    def check_vocab(self, rows: Iterable[Sequence[int]], place: str) -> None:
        """Raises DataError, which names ``place``, for token ids outside of the vocabulary."""
        if self.vocab is None:
            return
        for row in rows:
            for token in (min(row, default=0), max(row, default=0)):
                if not 0 <= token < self.vocab:
                    raise DataError(
                        f"{place}: token id {token} is outside the model's vocabulary of {self.vocab}: this "
                        "tokenizer belongs to another model, or its new tokens have no rows in the embedding"
                    )

    def check(self, rows: Sequence[Sequence[int]], place: str) -> None:
        """Raises DataError, which names ``place``, for a prompt and its completions that the model cannot take; where
        there are none yet, ``response`` tokens must fit behind the prompt."""
        self.check_vocab(rows, place)
        length = len(rows[0]) + max(map(len, rows[1:]), default=self.response)
        if self.context is not None and length > self.context:
            part = f", max_tokens={self.response} included" if self.response and len(rows) == 1 else ""
            raise DataError(
                f"{place} has {length} tokens{part}, more than the model's context of {self.context}: lower the limits "
                "of length, or make the data set with limits=Limits(context=...), which skips such rows"
            )


class TokenisedDataset(Generic[T, ConfigT]):
    """A fixed list of records.

    Args:
        source: a path or glob pattern, a `datasets.Dataset` or a list of dicts; None means ``config.path``.
        limits: of the model, where it is known: rows that exceed them are refused, or skipped if ``overlong`` says so.

    Attributes:
        skipped: number of rows left out, by reason.
        name: of the source, for messages.

    Raises:
        DataError: no rows, missing columns, rows of the wrong kind, or nothing left after skipping.
    """

    class Config(ConfigRecord):
        """Options of every data set."""

        path: str = ""
        """File or glob pattern: .jsonl, .jsonl.gz, .json or .parquet. Empty when a data set is given in Python."""
        max_records: int | None = Field(default=None, ge=1)
        """Read only so many rows."""

    def __init__(self, source: Any, tokenizer: Tokenizer, config: ConfigT, limits: Limits | None = None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self.skipped: Counter[str] = Counter()
        if source is None and not config.path:
            raise DataError("no data: give a data set, or set the path of a data file")
        records = read_records(source if source is not None else config.path, config.max_records)
        self.name = str(source) if isinstance(source, str | Path) else config.path or "the data set"
        self.prepare(records)
        self.items = [item for index, _ in records for item in self._convert(records, index)]
        self._report(len(records), self.name)

    def prepare(self, records: Records) -> None:
        """Check the columns before any row is converted."""

    def convert(self, records: Records, index: int) -> list[T]:
        """What row ``index`` becomes.

        Raises:
            SkipRowError: leave the row out.
            DataError: the row is wrong.
        """
        raise NotImplementedError

    def check(self, limits: Limits) -> None:
        """Check that a model with these limits can take all records, for a data set built without them.

        Raises:
            DataError: a record has a token outside of the vocabulary, or is longer than the context.
        """
        if self.limits.vocab == limits.vocab and self.limits.context == limits.context:
            return
        for number, item in enumerate(self.items):
            limits.check(list(self.token_rows(item)), f"{self.name}: record {number}")

    @cached_property
    def digest(self) -> str:
        """A hash of what all records train on: their tokens, answers, labels and margins, but not their other columns.
        The same on every rank and in every run."""
        found = hashlib.blake2b(digest_size=8)
        for item in self.items:
            for row in self.token_rows(item):
                found.update(array("q", [len(row), *row]).tobytes())
            found.update(ADDRESS.sub("", repr(self.truth(item))).encode(errors="surrogatepass"))
        return found.hexdigest()

    def truth(self, item: T) -> object:
        """The answer, label or margin of a record."""
        return None

    def token_rows(self, item: T) -> Iterable[Sequence[int]]:
        """The token ids of a record: its prompt, then each of its completions."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> T:
        return self.items[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def shard(self, rank: int, size: int) -> list[T]:
        """Every ``size``-th record from ``rank`` on: this rank's part of one pass over all of them."""
        return self.items[rank::size]

    def _convert(self, records: Records, index: int) -> list[T]:
        place = records.places[index]
        try:
            items = self.convert(records, index)
        except SkipRowError as skip:
            self.skipped[skip.reason] += 1
            return []
        except DataError as error:
            raise error if place in str(error) else DataError(f"{place}: {error}") from None
        for item in items:
            self.limits.check_vocab(self.token_rows(item), place)
        return items

    def _report(self, num_rows: int, name: str) -> None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
        if not self.items:
            raise DataError(f"{name}: none of {num_rows} rows is left: {reasons}")
        if reasons:
            logger.warning("%s: %d of %d rows skipped: %s", name, sum(self.skipped.values()), num_rows, reasons)
