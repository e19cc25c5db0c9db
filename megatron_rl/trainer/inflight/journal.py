"""`Journal`: what a rollout rank has finished, on disk before anybody relies on it.

One file a rank, to which records are appended, each with its length and checksums, and synced. Opening a journal reads
it back: a last record that a killed process left incomplete is cut off; a damaged one is named and passed over, and
those after it are found again by their marker. A checkpoint keeps the offset up to which its run had written.

    head    b"MRLJRNL1", number of bytes dropped from the front, checksum of both
    record  marker, its offset, payload's length, payload's checksum, checksum of these four, payload
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import xxhash

logger = logging.getLogger(__name__)

MAGIC = b"MRLJRNL1"
MARKER = b"\xa9REC"
HEAD = struct.Struct("<8sQQ")
RECORD = struct.Struct("<4sQQQQ")


class JournalError(RuntimeError):
    """A journal could not be written, or the file is none."""


class Record(NamedTuple):
    """One record as it was found."""

    number: int  # from 0, in the order of the file, damaged ones included
    offset: int  # of its first byte, counted from the first byte ever written
    payload: bytes


class Damage(NamedTuple):
    """A record that is not as it was written; without its length, what lies before the next whole one."""

    path: Path
    number: int  # of the record that they were
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return (
            f"journal {self.path}: record {self.number} at offset {self.offset} is damaged ({self.num_bytes} bytes are "
            "not as they were written)"
        )


class Content(NamedTuple):
    """What `read_journal` finds in a file."""

    records: list[Record]
    damaged: list[Damage]
    dropped: int  # bytes, from the front
    end: int  # the offset after the last record
    torn: int  # bytes after it: a record whose writing was interrupted
    head_is_whole: bool


class Journal:
    """An open journal. One process writes it.

    Args:
        path: the file; made where it does not exist.
        sync: puts a file descriptor's data on the disk.

    Attributes:
        records: what the file held when it was opened.
        damaged: what could not be read of it.
        end: the offset after the last record; a checkpoint stores it.

    Raises:
        JournalError: ``path`` is no journal, or cannot be made.
    """

    def __init__(self, path: Path, sync: Callable[[int], None] = os.fdatasync) -> None:
        self.path = path
        self._sync = sync
        with self._naming("opened"):
            self._opened = _open(path)
            size = os.fstat(self._file).st_size
        if size < HEAD.size and _head(0).startswith(path.read_bytes()):  # new, or killed as it was made
            with self._naming("made"):
                _write_all(self._file, _head(0), 0)
                self._sync(self._file)
                _sync_folder(path.parent)
        try:
            self.records, self.damaged, self._dropped, self.end, torn, head_is_whole = read_journal(path)
        except JournalError:
            self.close()
            raise
        if not head_is_whole:
            with self._naming("mended"):
                _write_all(self._file, _head(self._dropped), 0)
        if torn:
            with self._naming("cut"):
                self._cut(self.end)

    @property
    def _file(self) -> int:
        return self._opened.fileno()

    @property
    def start(self) -> int:
        """The offset of the first byte that is kept."""
        return self._dropped + HEAD.size

    # Writing

    def append(self, payload: bytes) -> int:
        """Write one record; returns `end` when it is on the disk.

        Raises:
            JournalError: the disk is full, or fails. The journal is as it was, and may be tried again.
        """
        fields = struct.pack("<4sQQQ", MARKER, self.end, len(payload), _checksum(payload))
        data = fields + struct.pack("<Q", _checksum(fields)) + payload
        with self._naming("written"):
            self._write(data)
        self.end += len(data)
        return self.end

    def cut(self, end: int) -> None:
        """Forget all records from the offset ``end`` on: those of a future that the run does not take again."""
        places = {record.offset for record in self.records} | {damage.offset for damage in self.damaged}
        if end not in places | {self.start, self.end}:
            raise ValueError(
                f"journal {self.path}: offset {end} is no end of a record; the last one ends at {self.end}"
            )
        with self._naming("cut"):
            self._cut(end)
        self.records = [record for record in self.records if record.offset < end]
        self.damaged = [damage for damage in self.damaged if damage.offset < end]
        self.end = end

    def drop_before(self, start: int) -> None:
        """Give the space of all records before the offset ``start`` back; offsets stay as they are. What is kept goes
        to another file, which replaces this one when it is on the disk."""
        if not self.start <= start <= self.end:
            raise ValueError(f"journal {self.path}: offset {start} is outside of {self.start} to {self.end}")
        with self._naming("shortened"):
            self._shorten(start)
        self.records = [record for record in self.records if record.offset >= start]
        self.damaged = [damage for damage in self.damaged if damage.offset >= start]

    def close(self) -> None:
        """Release the file."""
        self._opened.close()

    @contextlib.contextmanager
    def _naming(self, verb: str) -> Iterator[None]:
        """An error of the disk says which file could not be ``verb``."""
        try:
            yield
        except OSError as error:
            folder = next(found for found in self.path.absolute().parents if found.is_dir())
            free = shutil.disk_usage(folder).free / 2**20
            remedy = ": free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise JournalError(
                f"journal {self.path} could not be {verb} ({error.strerror}; {free:,.1f} MiB were free); what it held "
                f"before stands{remedy}"
            ) from error

    def _write(self, data: bytes) -> None:
        place = self.end - self._dropped
        try:
            _write_all(self._file, data, place)
            self._sync(self._file)
        except OSError:
            os.ftruncate(self._file, place)
            raise

    def _cut(self, end: int) -> None:
        os.ftruncate(self._file, end - self._dropped)
        self._sync(self._file)

    def _shorten(self, start: int) -> None:
        kept = os.pread(self._file, self.end - start, start - self._dropped)
        dropped = start - HEAD.size
        other = self.path.with_name(f".{self.path.name}.shortened")
        file = _open(other)
        try:
            os.ftruncate(file.fileno(), 0)
            _write_all(file.fileno(), _head(dropped) + kept, 0)
            self._sync(file.fileno())
            os.replace(other, self.path)
        except OSError:
            file.close()
            other.unlink(missing_ok=True)
            raise
        self.close()
        self._opened, self._dropped = file, dropped
        _sync_folder(self.path.parent)


def read_journal(path: Path) -> Content:
    """What a journal holds; the file does not change. What is wrong with it is logged.

    Raises:
        JournalError: ``path`` is no journal.
    """
    data = path.read_bytes()
    dropped = _dropped(data)
    head_is_whole = dropped is not None
    if dropped is None:
        first = next(found_records(data, 0), None)
        if first is None:
            raise JournalError(
                f"{path} is no journal, or all of it is damaged: move it away, and what it held is sampled again"
            )
        dropped = first.offset - first.place
        logger.warning("journal %s: its head is damaged; its records tell what it said", path)
    records, damaged = list[Record](), list[Damage]()
    at = HEAD.size
    for found in found_records(data, at, dropped):
        number = len(records) + len(damaged)
        if found.place > at:
            damaged.append(Damage(path, number, at + dropped, found.place - at))
            number += 1
        if found.payload is None:
            damaged.append(Damage(path, number, found.offset, found.num_bytes))
        else:
            records.append(Record(number, found.offset, found.payload))
        at = found.place + found.num_bytes
    for damage in damaged:
        logger.warning("%s", damage)
    if at < len(data):
        said = "journal %s: its last record (number %d at offset %d) is not whole, %d bytes are cut off"
        logger.warning(said, path, len(records) + len(damaged), at + dropped, len(data) - at)
    return Content(records, damaged, dropped, at + dropped, len(data) - at, head_is_whole)


def _dropped(data: bytes) -> int | None:
    """What the head says; None where it is damaged."""
    if len(data) < HEAD.size:
        return None
    magic, dropped, checksum = HEAD.unpack_from(data)
    return int(dropped) if magic == MAGIC and checksum == _checksum(data[: HEAD.size - 8]) else None


class _Found(NamedTuple):
    place: int  # in the file
    offset: int
    num_bytes: int  # of the record
    payload: bytes | None  # None where it is damaged


def found_records(data: bytes, start: int, dropped: int | None = None) -> Iterator[_Found]:
    """Every record in ``data`` from ``start`` on that is all there, by its own account.

    Args:
        dropped: bytes dropped from the front; records that say otherwise are none. None: not known.
    """
    at = start
    while (at := data.find(MARKER, at)) >= 0:
        found = _record_at(data, at)
        if found is None or dropped not in (None, found.offset - at):
            at += 1
        else:
            yield found
            at += found.num_bytes


def _record_at(data: bytes, at: int) -> _Found | None:
    """The record at ``at``, None where its fields are damaged or its end is missing."""
    if len(data) - at < RECORD.size:
        return None
    _, offset, length, checksum, of_fields = RECORD.unpack_from(data, at)
    start = at + RECORD.size
    if of_fields != _checksum(data[at : start - 8]) or length > len(data) - start:
        return None
    payload = data[start : start + length]
    return _Found(at, offset, RECORD.size + length, payload if _checksum(payload) == checksum else None)


def _checksum(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _head(dropped: int) -> bytes:
    fields = struct.pack("<8sQ", MAGIC, dropped)
    return fields + struct.pack("<Q", _checksum(fields))


def _write_all(file: int, data: bytes, place: int) -> None:
    while data:
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written


def _open(path: Path) -> FileIO:
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")


def _sync_folder(folder: Path) -> None:
    """Put a new name on the disk."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
