"""`TensorFiles`: the ``.distcp`` files and the ``.metadata`` of a Megatron checkpoint, written part by part.

The format is that of ``torch.distributed.checkpoint``, which Megatron-Core saves in; every reader of it takes parts of
any size. One file for each rank of a layout; each file's digest is made on the way.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
import pickle
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

JOINED_BYTES = 1 << 15
OPEN_FILES = 64  # of the possibly thousands of ranks
NO_STATE = [None]  # what Megatron-Core's linear layers keep beside their weights


@dataclass
class Written:
    """What one process wrote."""

    chunks: dict[MetadataIndex, tuple[int, ...]] = field(default_factory=dict)  # -> sizes
    storage: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)  # of chunks and states
    digests: dict[str, str] = field(default_factory=dict)  # of files, by name


class TensorFiles:
    """Files of some ranks, written by one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, Written()
        self._hashes: dict[str, Any] = {}
        self._ends: dict[str, int] = {}
        self._open = functools.lru_cache(OPEN_FILES)(lambda name: (folder / name).open("ab", buffering=0))

    def write(
        self,
        rank: int,
        key: str,
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        blocks: Iterable[Tensor],
    ) -> None:
        """A part of the tensor ``key`` into the file of a rank; ``blocks`` are its elements in order, contiguous."""
        index = MetadataIndex(key, torch.Size(offsets))
        self._written.chunks[index] = sizes
        num_bytes = math.prod(sizes) * dtype.itemsize
        if num_bytes < JOINED_BYTES:
            self._append(rank, index, torch.cat([block.reshape(-1) for block in blocks]).view(sizes))
        else:
            memory = mmap.mmap(-1, num_bytes)  # takes none until it is touched, which nothing does
            self._append(rank, index, torch.frombuffer(memory, dtype=dtype).view(sizes), blocks)

    def write_state(self, rank: int, key: str) -> None:
        """An empty extra state."""
        self._append(rank, MetadataIndex(key), NO_STATE)

    def _append(self, rank: int, index: MetadataIndex, content: object, blocks: Iterable[Tensor] = ()) -> None:
        name = f"__{rank}_0.distcp"
        start = self._ends.get(name, 0)
        stream: Any = _Hashing(self._open(name), self._hashes.setdefault(name, xxhash.xxh3_128()), blocks)
        try:
            torch.save(content, stream)
            stream.flush()
        except RuntimeError as error:  # torch's words for what `stream` raised
            raise stream.error or error from None
        self._ends[name] = start + stream.count
        self._written.storage[index] = _StorageInfo(name, start, stream.count)

    def close(self) -> Written:
        """Wait until all is on disk."""
        for name, digest in self._hashes.items():
            os.fsync(self._open(name).fileno())
            self._written.digests[name] = digest.hexdigest()
        self._open.cache_clear()
        return self._written


class _Hashing:
    """A file that is written in order; counts, digests, and joins the dozens of small pieces that torch.save makes.

    The one large piece that torch.save makes is the memory of the tensor. It is not looked at: ``blocks`` are written
    in its place, so that a tensor which was never filled, and takes no memory, stands for one that is read from a file.
    """

    def __init__(self, file: Any, digest: Any, blocks: Iterable[Tensor]) -> None:
        self._file, self._digest, self._small, self._blocks = file, digest, bytearray(), blocks
        self.count = 0
        self.error: Exception | None = None

    def write(self, data: Any) -> int:
        given = memoryview(data).nbytes
        self.count += given
        if given < JOINED_BYTES:
            self._small += data
            return given
        try:
            self.flush()
            written = 0
            for block in self._blocks:
                written += block.nbytes
                self._append(block.view(-1).view(torch.uint8).numpy().data)
            assert written == given, f"{written} of {given} bytes were given"
        except Exception as error:
            self.error = error
            raise
        return given

    def flush(self) -> None:
        """Write what is held back."""
        small, self._small = self._small, bytearray()
        self._append(memoryview(small))

    def _append(self, rest: memoryview) -> None:
        self._digest.update(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def without_crc32() -> Iterator[None]:
    """torch.save's own checksum costs as much as all else, and reads the memory that stands for a tensor; nothing that
    reads checkpoints looks at it: the files have digests. Of this thread."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_metadata(
    folder: Path, kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]], parts: Iterable[Written]
) -> None:
    """Write ``.metadata``, which names every part.

    Args:
        kinds: key -> shape and dtype of each tensor.
    """
    entries: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
        for key, (shape, dtype) in kinds.items()
    }
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for part in parts:
        storage |= part.storage
        for index in part.storage:
            if index not in part.chunks:
                entries[index.fqn] = BytesStorageMetadata()
        for index, sizes in part.chunks.items():
            assert index.offset is not None, "of a tensor"
            entries[index.fqn].chunks.append(ChunkStorageMetadata(index.offset, torch.Size(sizes)))
    metadata = Metadata(entries, None, storage, StorageMeta(folder.name, str(uuid.uuid4())), version="1.0.0")
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())
