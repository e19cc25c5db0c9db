"""Safetensors files: read by rows, written whole or row by row, with the permissions that the umask allows.

Nothing here holds a whole file, and reads are not mapped: the resident memory of a process is what it holds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {  # also those of buffers, and of weights for a server
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
ALIGNMENT = 8  # bytes, of where the tensors begin in a file


class Entry(NamedTuple):
    """One tensor in the header of a file."""

    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


class SafetensorsFile:
    """One file, open.

    Raises:
        SafetensorError, OSError: it cannot be read, or its header and its size do not fit together.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt", device="cpu"):  # checks the header
            pass
        self.path, self._file = path, path.open("rb")
        length = int.from_bytes(self._file.read(8), "little")
        header: dict[str, Any] = json.loads(self._file.read(length))
        self.entries = {
            name: Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, rows: range, cols: range) -> Tensor:
        """A rectangle of a tensor that is seen as a matrix (`reshard.layout.matrix_shape`)."""
        entry = self.entries[name]
        width = entry.shape[-1] if len(entry.shape) > 1 else 1
        dtype = DTYPES[entry.dtype]
        row_bytes = width * dtype.itemsize
        start = entry.start + rows.start * row_bytes
        if len(cols) == width:
            result = torch.empty(len(rows), width, dtype=dtype)
            read_into(self._file.fileno(), self.path, result, start)
            return result
        # Mapped while it is copied: only the pages that hold the columns are touched.
        whole = np.memmap(self._file, np.uint8, "r", start, (len(rows), row_bytes))
        part = whole[:, cols.start * dtype.itemsize : cols.stop * dtype.itemsize].copy()
        return torch.from_numpy(part).view(dtype)


def read_into(file: int, path: Path, tensor: Tensor, start: int) -> None:
    """Fill contiguous ``tensor`` with the bytes from ``start`` on of an open file.

    Raises:
        OSError: the file ends before.
    """
    rest: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    while rest:
        count = os.preadv(file, [rest], start)
        if count == 0:
            raise OSError(f"{path} ends at byte {start}, {len(rest)} bytes before a tensor does: restore the file")
        rest, start = rest[count:], start + count


class SafetensorsWriter:
    """Writes one file piece by piece, byte for byte as `safetensors` writes it whole; a context manager.

    Args:
        tensors: name -> shape and dtype.
        durable: wait until it is on disk.

    Attributes:
        names: in the order in which they must be written.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], durable: bool = True
    ) -> None:
        self.names = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, _rank(tensors[name][1]), name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self.names:
            shape, dtype = tensors[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self.path, self._left, self._durable = path, end, durable
        self._file = path.open("wb", buffering=0)
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                assert self._left == 0, f"{self._left} bytes of {self.path} were not written"
                if self._durable:
                    os.fsync(self._file.fileno())

    def write(self, rows: Tensor) -> None:
        """The next rows of the next tensor, contiguous."""
        data: memoryview = rows.view(-1).view(torch.uint8).numpy().data
        self._left -= len(data)
        self._write(data)

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]


def _rank(dtype: torch.dtype) -> int:
    """The order of dtypes of one size in safetensors' enumeration, largest first: BF16 stands behind F16."""
    return {torch.bfloat16: 0, torch.float16: 1}.get(dtype, 0)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], durable: bool = False) -> None:
    """Write ``tensors``, on any device. safetensors' own writer makes files that only their owner can read (0600)."""
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, kinds, durable) as file:
        for name in file.names:
            file.write(tensors[name].detach().cpu().contiguous())


@contextlib.contextmanager
def shared_temporary_folder(prefix: str, parent: str | None) -> Iterator[Path]:
    """A temporary folder that processes of other users may look into, as far as the umask lets them.

    Args:
        parent: where it lies; None = the temporary files of this machine.
    """
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
        inner = Path(name) / "files"
        inner.mkdir()
        Path(name).chmod(inner.stat().st_mode & 0o777)
        yield inner


def write_parts(folder: Path, tensors: Mapping[str, Tensor], number: int) -> None:
    """Write ``tensors`` as the ``number``-th file of ``folder``; nothing where there are none."""
    if tensors:
        write_safetensors(folder / f"model-{number:05d}.safetensors", tensors)
