"""`TensorFiles`: the ``.distcp`` files and the ``.metadata`` of a Megatron checkpoint, written part by part.

The format is that of ``torch.distributed.checkpoint``, which Megatron-Core saves in; every reader of it takes parts of
any size. One file for each rank of a layout; each file's digest is made on the way.
"""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterable, Mapping
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
NO_STATE = [None]  # what Megatron-Core's linear layers keep beside their weights


@dataclass
class Written:
    """What one process wrote."""

    chunks: dict[MetadataIndex, tuple[int, ...]] = field(default_factory=dict)  # -> sizes
    storage: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)  # of chunks and states
    digests: dict[str, str] = field(default_factory=dict)  # of files, by name


class TensorFiles:
    """One process's files."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, Written()
        self._hashes: dict[str, Any] = {}
        self._ends: dict[str, int] = {}

    def write(self, rank: int, key: str, offsets: tuple[int, ...], values: Tensor) -> None:
        """A part of the tensor ``key``, contiguous, into the file of a rank."""
        index = MetadataIndex(key, torch.Size(offsets))
        self._written.chunks[index] = tuple(values.shape)
        self._append(rank, index, values)

    def write_state(self, rank: int, key: str) -> None:
        """An empty extra state."""
        self._append(rank, MetadataIndex(key), NO_STATE)

    def _append(self, rank: int, index: MetadataIndex, content: object) -> None:
        name = f"__{rank}_0.distcp"
        start = self._ends.get(name, 0)
        with (self._folder / name).open("ab", buffering=0) as file:
            stream: Any = _Hashing(file, self._hashes.setdefault(name, xxhash.xxh3_128()))
            try:
                torch.save(content, stream)
                stream.flush()
            except RuntimeError as error:  # torch's words for what the file system said
                raise stream.error or error from None
        self._ends[name] = start + stream.count
        self._written.storage[index] = _StorageInfo(name, start, stream.count)

    def close(self) -> Written:
        """Wait until all is on disk."""
        for name, digest in self._hashes.items():
            with (self._folder / name).open("rb") as file:
                os.fsync(file.fileno())
            self._written.digests[name] = digest.hexdigest()
        return self._written


class _Hashing:
    """A file that is written in order; counts, digests, and joins the dozens of small pieces that torch.save makes."""

    def __init__(self, file: Any, digest: Any) -> None:
        self._file, self._digest, self._small = file, digest, bytearray()
        self.count = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        given = memoryview(data).cast("B")
        self.count += len(given)
        if len(given) < JOINED_BYTES:
            self._small += given
            return len(given)
        self.flush()
        self._append(given)
        return len(given)

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
