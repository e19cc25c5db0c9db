"""`StoredChunks`: rectangles of the tensors in a checkpoint of ``torch.distributed.checkpoint``, without the rest.

A tensor is stored in chunks, each a file of ``torch.save`` inside a larger file. torch's reader loads a chunk whole,
and twice (its bytes, then the tensor); here the rows that are asked for are read from where they lie.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_rl.config import ConfigError
from megatron_rl.models.safetensors_files import read_into
from megatron_rl.reshard.layout import matrix_shape
from megatron_rl.reshard.rectangle import Rectangle

OPEN_FILES = 64
LOCAL_HEADER = 30  # bytes of a zip file's header before a member, without name and extra field


class _Window(NamedTuple):
    """What a chunk holds of the wanted tensor, whose rows lie below one another in the chunk."""

    held: Rectangle
    first: int  # row of the chunk's matrix that is the first of the window


class StoredChunks:
    """Reads a checkpoint's tensors.

    Args:
        tensors, storage: of its metadata.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, TensorStorageMetadata], storage: Mapping[MetadataIndex, Any]
    ) -> None:
        self._folder, self._tensors, self._storage = folder, tensors, storage
        self._open = functools.lru_cache(OPEN_FILES)(lambda name: (folder / name).open("rb"))
        self._by_place: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._starts: dict[MetadataIndex, int | None] = {}

    def read(self, key: str, place: tuple[int, ...], shape: tuple[int, ...], part: Rectangle | None = None) -> Tensor:
        """A rectangle (None: all) of one of the tensors of ``shape``, seen as a matrix, that are stacked in ``key``.

        Args:
            place: of that tensor in the leading dims.

        Raises:
            ConfigError: the checkpoint lacks some of it.
        """
        rows, cols = matrix_shape(shape)
        wanted, entry = part or Rectangle(0, rows, 0, cols), self._tensors[key]
        result = torch.empty(wanted.num_rows, wanted.num_cols, dtype=entry.properties.dtype)
        found = 0
        for chunk in self._at(key, place):
            window = _window(chunk, place, shape, key)
            if common := wanted.intersection(window.held):
                row, col = common.row_start - wanted.row_start, common.col_start - wanted.col_start
                target = result[row : row + common.num_rows, col : col + common.num_cols]
                first_row = window.first + common.row_start - window.held.row_start
                first_col = common.col_start - window.held.col_start
                self._read_into(target, key, chunk, window.held.num_cols, first_row, first_col)
                found += common.numel
        if found != wanted.numel:
            raise ConfigError(f"{self._folder} holds {found} of the {wanted.numel} elements of {key}{wanted}")
        return result

    def _at(self, key: str, place: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """Chunks that hold some of the tensor at ``place``."""
        lead = len(place)
        if (key, lead) not in self._by_place:
            found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self._tensors[key].chunks:
                ranges = (range(at, at + n) for at, n in zip(chunk.offsets[:lead], chunk.sizes[:lead], strict=True))
                for index in itertools.product(*ranges):
                    found.setdefault(index, []).append(chunk)
            self._by_place[key, lead] = found
        return self._by_place[key, lead].get(place, [])

    def _read_into(
        self, target: Tensor, key: str, chunk: ChunkStorageMetadata, cols: int, first_row: int, first_col: int
    ) -> None:
        """Fill ``target``, a matrix, from a chunk that is a matrix with ``cols`` columns."""
        index, dtype = MetadataIndex(key, chunk.offsets), target.dtype
        stored, across = self._storage[index], slice(first_col, first_col + target.shape[1])
        file = self._open(stored.relative_path)
        if index not in self._starts:
            data = _Part(file, stored.offset, stored.length)
            self._starts[index] = _plain_start(data, tuple(chunk.sizes), dtype)
        begin = self._starts[index]
        if begin is None:
            data = _Part(file, stored.offset, stored.length)
            loaded = torch.load(io.BytesIO(data.read()), map_location="cpu", weights_only=True)
            target.copy_(loaded.reshape(-1, cols)[first_row : first_row + len(target), across])
            return
        path, start = self._folder / stored.relative_path, stored.offset + begin + first_row * cols * dtype.itemsize
        if target.is_contiguous() and target.shape[1] == cols:
            read_into(file.fileno(), path, target, start)
        else:
            whole = torch.empty(len(target), cols, dtype=dtype)
            read_into(file.fileno(), path, whole, start)
            target.copy_(whole[:, across])


def _window(chunk: ChunkStorageMetadata, place: tuple[int, ...], shape: tuple[int, ...], key: str) -> _Window:
    """Where a chunk of the tensor at ``place`` meets it."""
    lead, index = len(place), 0
    for at, offset, size in zip(place, chunk.offsets[:lead], chunk.sizes[:lead], strict=True):
        index = index * size + at - offset
    offsets, sizes = tuple(chunk.offsets[lead:]), tuple(chunk.sizes[lead:])
    inner = math.prod(shape[1:-1]) if len(shape) > 2 else 1
    if len(shape) > 2 and (any(offsets[1:]) or sizes[1:] != shape[1:]):
        raise ConfigError(f"{key}, of {list(shape)}, is stored in parts of {list(sizes)}: expected cuts along dim 0")
    col, cols = (offsets[-1], sizes[-1]) if len(shape) > 1 else (0, 1)
    row, rows = (offsets[0] * inner, sizes[0] * inner) if shape else (0, 1)
    return _Window(Rectangle(row, row + rows, col, col + cols), index * rows)


class _Part(io.RawIOBase):
    """Some bytes of an open file as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        rest = self._length - self._at
        wanted = rest if size < 0 else min(size, rest)
        data = os.pread(self._file.fileno(), wanted, self._start + self._at)  # several threads read one file
        self._at += len(data)
        return data


class _Saved(NamedTuple):
    """What torch.save says of a tensor."""

    storage: tuple[Any, ...]  # "storage", kind, key, location, elements
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Description(pickle.Unpickler):
    """Reads what torch.save says of a tensor, and runs nothing."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Saved(storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")


def _plain_start(data: _Part, sizes: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Where, in what torch.save wrote of a tensor, its elements begin; None where they do not lie there in order."""
    try:
        with zipfile.ZipFile(data) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        # Not by archive.read(), which compares checksums: torch.save may leave them out.
        saved = _Description(io.BytesIO(_member(data, members["data.pkl"]))).load()
        order = _member(data, members["byteorder"]) if "byteorder" in members else b"little"
        values = members[f"data/{saved.storage[2]}"]
        plain = values.compress_type == zipfile.ZIP_STORED and order == b"little" and saved.offset == 0
        if not plain or tuple(saved.size) != sizes or values.file_size != math.prod(sizes) * dtype.itemsize:
            return None
        if tuple(saved.stride) != torch.empty(sizes, device="meta").stride():
            return None
        return _start(data, values)
    except (zipfile.BadZipFile, KeyError, AttributeError, pickle.UnpicklingError):
        return None


def _start(data: _Part, info: zipfile.ZipInfo) -> int:
    """Where the content of a member begins."""
    data.seek(info.header_offset)
    header = data.read(LOCAL_HEADER)
    extra = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return info.header_offset + LOCAL_HEADER + extra


def _member(data: _Part, info: zipfile.ZipInfo) -> bytes:
    """The content of a member that is not compressed, as none of torch.save's is."""
    data.seek(_start(data, info))
    return data.read(info.file_size)
