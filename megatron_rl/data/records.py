"""Reading rows: JSON lines, JSON, Parquet, a `datasets.Dataset` or a list of dicts -> `Records`.

Everything above works on `Records`, which also knows how to name a row in an error message ("train.jsonl:17").
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
ENCODING = "utf-8-sig"  # UTF-8, and what some programs put before it (BOM)


class DataError(ValueError):
    """Data that cannot be used; the message names the file or row, what was found and what was expected."""


@dataclass(frozen=True)
class Records:
    """Rows in a fixed order."""

    rows: Sequence[Row]
    columns: tuple[str, ...]  # of the first row
    places: Sequence[str]  # how each row is called in messages

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return iter(enumerate(self.rows))

    def require(self, *columns: str) -> None:
        """Raises DataError when the data lacks one of ``columns``; the message lists those it has."""
        missing = [column for column in columns if column not in self.columns]
        if missing:
            raise DataError(
                f"{self.places[0]} has no column {missing[0]!r}; it has {', '.join(self.columns)}. "
                "Rename the column, or name the right one in the data configuration"
            )

    def value(self, index: int, column: str) -> Any:
        """One cell.

        Raises:
            DataError: the row lacks the column.
        """
        row = self.rows[index]
        if column not in row:
            raise DataError(f"{self.places[index]} has no {column!r}, unlike the first row; it has {', '.join(row)}")
        return row[column]


def read_records(source: Any, limit: int | None = None) -> Records:
    """Read ``source``, at most ``limit`` rows.

    Args:
        source: a path or glob pattern (.jsonl, .jsonl.gz, .json, .parquet; several files are read in the order of
            their names), a `datasets.Dataset`, or a sequence of dicts.

    Raises:
        DataError: nothing there, an unknown format, a broken line (file:line), or no rows.
    """
    if isinstance(source, str | Path):
        numbered = [row for path in data_files(str(source)) for row in _read_file(path)]
        places, rows = [place for place, _ in numbered], [row for _, row in numbered]
    else:
        rows = _read_object(source)
        places = [f"record {index}" for index in range(len(rows))]
    if not rows:
        raise DataError(f"no data: {source if isinstance(source, str | Path) else 'the data set'} has no rows")
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, Mapping):
            raise DataError(f"{place} is a {type(row).__name__}, expected an object with named columns")
    return Records(rows[:limit], tuple(rows[0]), places[:limit])


def _read_object(source: Any) -> list[Row]:
    if isinstance(source, Mapping):  # datasets.DatasetDict is a dict of splits
        raise DataError(
            f"one data set was expected, but this is a mapping: choose one of {', '.join(map(str, source))}"
        )
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise DataError(
            f"{type(source).__name__} is not a data set: expected a path, a datasets.Dataset (not a streaming one: its "
            "order could not be resumed), or a list of dicts"
        )
    return list(source)


def data_files(pattern: str) -> list[Path]:
    found = [Path(pattern)] if Path(pattern).is_file() else sorted(Path(p) for p in glob.glob(pattern))
    if not found:
        raise DataError(f"data file {pattern!r} does not exist (working directory: {Path.cwd()})")
    for path in found:
        if not path.name.endswith(SUFFIXES) or not path.is_file():  # folders, and pipes, which nobody may write to
            raise DataError(f"{str(path)!r} is no data file: expected one that ends in {', '.join(SUFFIXES)}")
    return found


def _read_file(path: Path) -> list[tuple[str, Row]]:
    if path.suffix == ".parquet":
        return _numbered(path, _read_parquet(path))
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding=ENCODING))
            if not isinstance(rows, list):
                raise DataError(f"{path} holds a {type(rows).__name__}, expected a list of objects")
            return _numbered(path, rows)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines = [(n, line) for n, line in enumerate(file, start=1) if line.removeprefix(codecs.BOM_UTF8).strip()]
            return [(f"{path}:{n}", _parse(path, n, line)) for n, line in lines]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _parse(path: Path, number: int, line: bytes) -> Row:
    try:
        text = line.decode(ENCODING if number == 1 else "utf-8")
        row = json.loads(text)
        if "\\ud" in text.lower():  # a character beyond 16 bits, or half of one
            json.dumps(row, ensure_ascii=False).encode()
        return row
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}:{number}: a lone surrogate {error.object[error.start]!r}, half of a character, which no tokenizer "
            "can encode: mend or drop the row"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting as deep
        raise DataError(f"{path}:{number}: cannot be read: {error!s:.100}") from None


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow  # slow to import, and only Parquet needs it
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _numbered(path: Path, rows: Sequence[Row]) -> list[tuple[str, Row]]:
    return [(f"{path}[{index}]", row) for index, row in enumerate(rows)]
