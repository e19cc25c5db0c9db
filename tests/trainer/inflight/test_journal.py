"""The journal gives back exactly what was appended, whatever of its file is missing or changed."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_disk import mounted_disk

from megatron_rl.trainer.inflight.journal import HEAD, RECORD, Journal, JournalError

PAYLOADS = [b"first", b"", bytes(range(256)) * 3, b"\xa9REC" * 20, b"last one"]


def payloads(journal: Journal) -> list[bytes]:
    return [record.payload for record in journal.records]


@pytest.fixture
def path(tmp_path) -> Path:
    """A journal of `PAYLOADS`, closed."""
    journal = Journal(tmp_path / "rank_3.journal")
    for payload in PAYLOADS:
        journal.append(payload)
    journal.close()
    return journal.path


def test_what_was_appended_is_there_when_it_is_opened_again(path):
    journal = Journal(path)
    assert payloads(journal) == PAYLOADS
    assert not journal.damaged
    assert [record.number for record in journal.records] == [0, 1, 2, 3, 4]
    starts = [HEAD.size + sum(RECORD.size + len(p) for p in PAYLOADS[:i]) for i in range(len(PAYLOADS))]
    assert [record.offset for record in journal.records] == starts
    assert journal.end == path.stat().st_size
    before = journal.end
    assert journal.append(b"more") == journal.end == before + RECORD.size + 4
    assert payloads(Journal(path)) == [*PAYLOADS, b"more"]


def test_a_record_is_synced_before_append_returns(tmp_path):
    synced = []
    journal = Journal(tmp_path / "j", sync=lambda file: synced.append(os.fstat(file).st_size))
    ends = [journal.append(payload) for payload in PAYLOADS]
    assert synced == [HEAD.size, *ends]


def test_a_journal_cut_anywhere_keeps_its_whole_records_and_takes_new_ones(path, caplog):
    data, ends = path.read_bytes(), [record.offset for record in Journal(path).records][1:]
    for size in range(len(data)):
        path.write_bytes(data[:size])
        caplog.clear()
        journal = Journal(path)
        whole = sum(end <= size for end in ends)
        assert payloads(journal) == PAYLOADS[:whole]
        assert not journal.damaged
        torn = size > HEAD.size and size not in [HEAD.size, *ends]
        assert bool(caplog.messages) == torn
        if torn:
            (said,) = caplog.messages
            kept = path.stat().st_size
            assert said == f"journal {path}: its last record (number {whole} at offset {kept}) is not whole, " + (
                f"{size - kept} bytes are cut off"
            )
        journal.append(b"after")
        journal.close()
        assert payloads(Journal(path)) == [*PAYLOADS[:whole], b"after"]


def test_any_flipped_byte_costs_the_record_it_is_in_and_no_other(path, caplog):
    data, starts = path.read_bytes(), [record.offset for record in Journal(path).records]
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :])
        caplog.clear()
        journal = Journal(path)
        hit = sum(start <= place for start in starts) - 1
        if hit < 0:
            assert payloads(journal) == PAYLOADS
            assert caplog.messages == [f"journal {path}: its head is damaged; its records tell what it said"]
            assert path.read_bytes() == data
            continue
        assert payloads(journal) == [payload for number, payload in enumerate(PAYLOADS) if number != hit]
        assert [record.offset for record in journal.records] == [s for n, s in enumerate(starts) if n != hit]
        in_fields = place < starts[hit] + RECORD.size
        if hit == len(PAYLOADS) - 1 and in_fields:  # no different from one whose writing was interrupted
            assert f"its last record (number {hit} at offset {starts[hit]}) is not whole" in caplog.messages[0]
        else:
            size = RECORD.size + len(PAYLOADS[hit])
            (damage,) = journal.damaged
            assert (damage.number, damage.offset, damage.num_bytes) == (hit, starts[hit], size)
            assert caplog.messages == [
                f"journal {path}: record {hit} at offset {starts[hit]} is damaged ({size} bytes are not as they were "
                "written)"
            ]
        journal.close()


def test_records_after_a_stretch_of_zeros_are_found(path):
    data, starts = path.read_bytes(), [record.offset for record in Journal(path).records]
    path.write_bytes(data[: starts[1]] + bytes(starts[3] - starts[1]) + data[starts[3] :])
    journal = Journal(path)
    assert payloads(journal) == [PAYLOADS[0], *PAYLOADS[3:]]
    assert [(d.offset, d.num_bytes) for d in journal.damaged] == [(starts[1], starts[3] - starts[1])]


def test_a_journal_inside_a_damaged_record_is_not_taken_for_records(tmp_path):
    inner = Journal(tmp_path / "inner")
    inner.append(b"not of this journal")
    outer = Journal(tmp_path / "outer")
    outer.append(b"whole")
    outer.append((tmp_path / "inner").read_bytes())
    outer.append(b"whole too")
    data = bytearray(outer.path.read_bytes())
    place = data.find(b"\xa9REC", HEAD.size + 1)
    data[place + 5] ^= 1
    outer.path.write_bytes(data)
    assert payloads(Journal(outer.path)) == [b"whole", b"whole too"]


@pytest.mark.parametrize("content", [b"something else, and long enough for a head", b"x"])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(JournalError, match=r"j is no journal, or all of it is damaged: move it away"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == content


def test_records_of_a_future_that_is_not_taken_are_cut(path):
    journal = Journal(path)
    journal.cut(journal.records[2].offset)
    assert payloads(journal) == PAYLOADS[:2]
    journal.append(b"another")
    assert payloads(Journal(path)) == [*PAYLOADS[:2], b"another"]
    with pytest.raises(ValueError, match="offset 30 is no end of a record"):
        journal.cut(30)


def test_space_before_an_offset_is_given_back_and_offsets_stay(path):
    journal = Journal(path)
    offsets, end, size = [record.offset for record in journal.records], journal.end, path.stat().st_size
    for kept in (2, 3):
        journal.drop_before(offsets[kept])
        assert path.stat().st_size == size - offsets[kept] + HEAD.size
        for now in (journal, Journal(path)):
            assert [(r.offset, r.payload) for r in now.records] == [*zip(offsets, PAYLOADS, strict=True)][kept:]
            assert now.end == end
    journal.drop_before(end)
    assert journal.append(b"next") == end + RECORD.size + 4
    again = Journal(path)
    assert [(record.offset, record.payload) for record in again.records] == [(end, b"next")]
    assert os.listdir(path.parent) == [path.name]
    data = bytearray(path.read_bytes())
    data[9] ^= 1  # the head's number of dropped bytes
    path.write_bytes(data)
    assert [(record.offset, record.payload) for record in Journal(path).records] == [(end, b"next")]
    with pytest.raises(ValueError, match=f"offset {offsets[2]} is outside of {end} to"):
        again.drop_before(offsets[2])


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with mounted_disk(tmp_path, "64k") as disk:
        yield disk


def test_a_full_disk_is_named_and_the_journal_goes_on_when_there_is_room(small_disk, caplog):
    path = small_disk / "rank_0.journal"
    (small_disk / "ballast").write_bytes(bytes(40 << 10))
    journal = Journal(path)
    journal.append(b"a" * 5000)
    for _ in range(2):
        with pytest.raises(
            JournalError, match=r"rank_0.journal could not be written \(No space left on device; 0.0 MiB"
        ):
            journal.append(b"b" * 30_000)
        assert path.stat().st_size == journal.end
    journal.append(b"c")  # a page that is there already
    (small_disk / "ballast").unlink()
    journal.append(b"b" * 30_000)
    with pytest.raises(JournalError, match=r"could not be shortened \(No space left on device"):
        journal.drop_before(journal.end - 30_000 - RECORD.size)
    caplog.set_level(logging.WARNING)
    assert payloads(Journal(path)) == [b"a" * 5000, b"c", b"b" * 30_000]
    assert os.listdir(small_disk) == [path.name]
    assert not caplog.messages


def test_a_limit_of_file_sizes_and_a_failing_sync_leave_whole_records(tmp_path):
    path = tmp_path / "j"
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    journal = Journal(path)
    journal.append(b"kept")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(JournalError, match=r"could not be written \(File too large; .* MiB were free\)"):
            journal.append(b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.stat().st_size == journal.end

    def broken(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    failing = Journal(path, sync=broken)
    with pytest.raises(JournalError, match="Input/output error"):
        failing.append(b"not on the disk")
    assert payloads(Journal(path)) == [b"kept"]


def append_for_ever(path: Path, said: int) -> None:
    """One record after another, each named on the pipe ``said`` when it is on the disk."""
    journal, number = Journal(path), 0
    while True:
        journal.append(b"%d " % number * 5000)
        os.write(said, b".")
        number += 1


def test_a_killed_process_leaves_all_that_it_had_appended(tmp_path):
    path, (reader, writer) = tmp_path / "j", os.pipe()
    for _ in range(5):
        path.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=append_for_ever, args=(path, writer))
        process.start()
        said = sum(len(os.read(reader, 1)) for _ in range(20))
        process.kill()
        process.join()
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            said += len(os.read(reader, 1 << 20))
        os.set_blocking(reader, True)
        found = payloads(Journal(path))
        assert found == [b"%d " % number * 5000 for number in range(len(found))]
        assert len(found) in (said, said + 1)
