"""`TokenisedDataset`: rows turned into records of token ids, once, with every skipped row counted by its reason.

Every rank builds the same data set, so that order and indices need no communication. Subclasses say what one row
becomes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_rl.config import ConfigRecord
from megatron_rl.data.records import DataError, Records, read_records
from megatron_rl.data.text import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")
Settings = TypeVar("Settings", bound="TokenisedDataset.Config")


class SkipRowError(Exception):
    """Raised while a row is converted: leave it out and count it under ``reason``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TokenisedDataset(Generic[T, Settings]):
    """A fixed list of records.

    Attributes:
        skipped: number of rows left out, by reason.

    Raises:
        DataError: no rows, missing columns, rows of the wrong kind, or nothing left after skipping.
    """

    class Config(ConfigRecord):
        """What every data set can be told."""

        path: str = ""
        """File or glob pattern: .jsonl, .jsonl.gz, .json or .parquet. Empty when a data set is given in Python."""
        max_records: int | None = None
        """Read only so many rows."""

    def __init__(self, source: Any, tokenizer: Tokenizer, config: Settings) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.skipped: Counter[str] = Counter()
        if source is None and not config.path:
            raise DataError("no data: give a data set, or set the path of a data file")
        records = read_records(source if source is not None else config.path, config.max_records)
        self.prepare(records)
        self.items = [item for index, _ in records for item in self._convert(records, index)]
        self._report(len(records), str(source) if isinstance(source, str | Path) else config.path or "the data set")

    def prepare(self, records: Records) -> None:
        """Check the columns before any row is converted."""

    def convert(self, records: Records, index: int) -> list[T]:
        """What row ``index`` becomes.

        Raises:
            SkipRowError: leave the row out.
            DataError: the row is wrong.
        """
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
        try:
            return self.convert(records, index)
        except SkipRowError as skip:
            self.skipped[skip.reason] += 1
            return []

    def _report(self, num_rows: int, name: str) -> None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
        if not self.items:
            raise DataError(f"{name}: none of {num_rows} rows is left: {reasons}")
        if reasons:
            logger.warning("%s: %d of %d rows skipped: %s", name, sum(self.skipped.values()), num_rows, reasons)
