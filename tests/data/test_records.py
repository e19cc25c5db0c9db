"""Every source of rows gives the same records; every defect is one error that says where."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from megatron_rl.data import DataError, read_records

ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}, {"prompt": "ü", "answer": 3}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_all_formats(folder: Path) -> list[Path]:
    import datasets

    (folder / "x.jsonl").write_text(LINES)
    with gzip.open(folder / "x.jsonl.gz", "wt") as file:
        file.write(LINES)
    (folder / "x.json").write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "x.parquet")
    return [folder / name for name in ("x.jsonl", "x.jsonl.gz", "x.json", "x.parquet")]


def test_all_sources_give_the_same_rows(tmp_path: Path) -> None:
    import datasets

    for source in [*write_all_formats(tmp_path), ROWS, tuple(ROWS), datasets.Dataset.from_list(ROWS)]:
        records = read_records(source)
        assert [dict(row) for _, row in records] == ROWS
        assert records.columns == ("prompt", "answer")
        assert len(read_records(source, limit=2)) == 2


def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, row in zip("bac", ROWS, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    records = read_records(f"{tmp_path}/*.jsonl")
    assert [row["prompt"] for _, row in records] == ["b", "a", "ü"]
    assert records.places == [f"{tmp_path}/{name}.jsonl:1" for name in "abc"]


def test_blank_lines_are_passed_over_and_line_numbers_stay_right(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [place.rsplit(":", 1)[1] for place in read_records(tmp_path / "x.jsonl").places] == ["1", "3"]


def test_a_bom_and_the_line_ends_of_windows_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"a": 1}\r\n\r\n{"a": 2}\r\n')
    records = read_records(tmp_path / "x.jsonl")
    assert [place.rsplit(":", 1)[1] for place in records.places] == ["2", "4"]
    assert [row["a"] for _, row in records] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "x.jsonl:2: not valid JSON"),
        ("x.jsonl", b"", "has no rows"),
        ("x.jsonl", b"[1]\n", "x.jsonl:1 is a list, expected an object"),
        ("x.jsonl", b"\xff\xfe\n", "x.jsonl:1: cannot be read"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "x.jsonl:2: cannot be read"),
        ("x.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b"\n", "x.jsonl:2: cannot be read"),
        ("x.jsonl", b'{"a": 1}\n{"a": ' + b"7" * 5000 + b"}\n", "x.jsonl:2: cannot be read"),
        ("x.jsonl", b'{"a": 1}\n{"a": {"b": ["\\uD83D x"]}}\n', "x.jsonl:2: a lone surrogate"),
        ("x.jsonl", gzip.compress(b'{"a": 1}\n', mtime=0), "x.jsonl:1: cannot be read"),
        ("x.json", b"[" * 100_000, "x.json cannot be read"),
        ("x.json", b"[" + b"7" * 5000 + b"]", "x.json cannot be read"),
        ("x.parquet", b"", "x.parquet cannot be read as Parquet"),
        ("x.parquet", b"PAR1" + b"x" * 100 + b"PAR1", "x.parquet cannot be read as Parquet"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-20], "x.jsonl.gz cannot be read"),
        ("x.json", b'{"a": 1}', "holds a dict, expected a list of objects"),
        ("x.json", b"[1,\n,2]", "x.json:2: not valid JSON"),
        ("x.jsonl.gz", b"no gzip at all", "x.jsonl.gz cannot be read"),
        ("x.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "x.jsonl.gz cannot be read"),
        ("x.parquet", b"PAR1 no parquet", "cannot be read as Parquet"),
        ("x.csv", b"a,b", "expected one that ends in .jsonl"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / name)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere/*.jsonl", "'nowhere/*.jsonl' does not exist"),
        ([], "has no rows"),
        ({"train": ROWS, "test": ROWS}, "choose one of train, test"),
        (iter(ROWS), "is not a data set"),
        (["text"], "record 0 is a str"),
    ],
)
def test_a_wrong_source_is_one_clear_error(source: object, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        read_records(source)
    assert expected in str(caught.value)


def test_missing_columns_and_cells_name_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1, "b": 2}\n{"a": 1}\n')
    records = read_records(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"has no column 'prompt'; it has a, b\."):
        records.require("a", "prompt")
    with pytest.raises(DataError, match=r"x.jsonl:2 has no 'b', unlike the first row; it has a"):
        records.value(1, "b")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    line = '{"prompt": "é"}'.encode()
    (tmp_path / "a.jsonl").write_bytes(mark + line + b"\r\n" + line)
    (tmp_path / "a.json").write_bytes(mark + b"[" + line + b"," + line + b"]")
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(mark + line + b"\n" + line)
    for name in ("a.jsonl", "a.json", "a.jsonl.gz"):
        assert list(read_records(tmp_path / name).rows) == [{"prompt": "é"}] * 2, name


def test_whole_characters_may_be_written_as_surrogate_pairs(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "\\ud83d\\ude00 \\\\ud83d"}\n')
    assert read_records(tmp_path / "x.jsonl").rows == [{"a": "😀 \\ud83d"}]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/nowhere")], ids=["d", "p", "l"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, make) -> None:
    make(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl' is no data file"):
        read_records(tmp_path / "x.jsonl")


def test_a_parquet_file_with_text_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet"):
        read_records(tmp_path / "x.parquet")
