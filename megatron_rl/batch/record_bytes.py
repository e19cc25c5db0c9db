"""`to_bytes` and `from_bytes`: samples as bytes and back, exact in every bit, and without running what the bytes say.

Written are `Prompt` and `Sample`, and what Python, numpy and torch call plain: None, bool, int, float, str, bytes,
list, tuple, dict, arrays and tensors. Lists of numbers lie packed. A record that occurs several times is written once
and is one object again afterwards, as the prompt of a group is. There is no other type, so a file made by somebody
else can at worst be refused; pickle would run it.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_rl.batch.sample import Prompt, Sample

RECORDS: dict[str, type] = {record.__name__: record for record in (Prompt, Sample)}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    )
}
INT64 = range(-(1 << 63), 1 << 63)
NUMPY_KINDS = "biufc"  # booleans and numbers; objects would need pickle
_U64 = struct.Struct("<Q")
_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")


class RecordBytesError(ValueError):
    """A value that cannot be written, or bytes that are none of ours."""


def to_bytes(value: Any) -> bytes:
    """``value`` as bytes.

    Raises:
        RecordBytesError: something in it has a type that is not written; the message says where it is.
    """
    writer = _Writer()
    writer.write(value, "")
    return bytes(writer.out)


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` was given; tensors are on the CPU.

    Raises:
        RecordBytesError: ``data`` was not written by it, or by a version with other fields.
    """
    reader = _Reader(data)
    try:
        value = reader.read()
    except (struct.error, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise RecordBytesError(f"not readable at byte {reader.at} of {len(data)}: {error}") from None
    if reader.at != len(data):
        raise RecordBytesError(f"{len(data) - reader.at} bytes are left over")
    return value


class _Writer:
    """Appends tagged values to ``out``."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.records: dict[int, int] = {}  # id of a record written already -> its number

    def write(self, value: Any, where: str) -> None:
        kind = type(value)
        if value is None or kind is bool:
            self.out += {None: b"N", True: b"T", False: b"F"}[value]
        elif kind is int:
            self._int(value)
        elif kind is float:
            self.out += b"f" + _F64.pack(value)
        elif kind is str:
            self._sized(b"s", value.encode("utf-8", "surrogatepass"))
        elif kind is bytes:
            self._sized(b"b", value)
        elif kind in (list, tuple):
            self._sequence(value, where)
        elif kind is dict:
            self.out += b"d" + _U64.pack(len(value))
            for key, item in value.items():
                self.write(key, f"{where} (a key)")
                self.write(item, f"{where}[{key!r}]")
        elif RECORDS.get(kind.__name__) is kind:
            self._record(value, where)
        elif isinstance(value, torch.Tensor) and value.dtype in DTYPES.values():
            self._tensor(value)
        elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in NUMPY_KINDS:
            self._array(value)
        else:
            raise RecordBytesError(
                f"{where.lstrip('.') or 'the value'} is a {kind.__module__}.{kind.__qualname__}: expected None, bool, "
                "int, float, str, bytes, list, tuple, dict, tensor or array of numbers; convert it where it is made"
            )

    def _sized(self, tag: bytes, data: bytes) -> None:
        self.out += tag + _U64.pack(len(data)) + data

    def _int(self, value: int) -> None:
        if value in INT64:
            self.out += b"i" + _I64.pack(value)
        else:
            self._sized(b"I", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))

    def _sequence(self, values: list[Any] | tuple[Any, ...], where: str) -> None:
        kinds = set(map(type, values))
        if type(values) is list and kinds == {float}:
            self._sized(b"R", np.array(values, "<f8").tobytes())
        elif type(values) is list and kinds == {int} and min(values) in INT64 and max(values) in INT64:
            self._sized(b"L", np.array(values, "<i8").tobytes())
        else:
            self.out += (b"l" if type(values) is list else b"t") + _U64.pack(len(values))
            for index, item in enumerate(values):
                self.write(item, f"{where}[{index}]")

    def _record(self, record: Any, where: str) -> None:
        number = self.records.get(id(record))
        if number is not None:
            self.out += b"m" + _U64.pack(number)
            return
        self.records[id(record)] = len(self.records)
        fields = dataclasses.fields(record)
        self._sized(b"r", type(record).__name__.encode())
        self.out += _U64.pack(len(fields))
        for field in fields:
            self._sized(b"s", field.name.encode())
            self.write(getattr(record, field.name), f"{where}.{field.name}")

    def _tensor(self, tensor: torch.Tensor) -> None:
        plain = tensor.detach().cpu().contiguous()
        self._sized(b"e", str(plain.dtype).removeprefix("torch.").encode())
        self._shaped(
            tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        )

    def _array(self, values: np.ndarray | np.generic) -> None:
        self._sized(b"A" if isinstance(values, np.generic) else b"a", values.dtype.str.encode())
        self._shaped(values.shape, values.tobytes())

    def _shaped(self, shape: tuple[int, ...], data: bytes) -> None:
        self._sized(b"L", np.array(shape, "<i8").tobytes())
        self._sized(b"b", data)


class _Reader:
    """Reads tagged values from ``data``, from the position ``at`` on."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.records: list[Any] = []
        self.kinds: dict[bytes, Callable[[], Any]] = {
            b"N": lambda: None,
            b"T": lambda: True,
            b"F": lambda: False,
            b"i": lambda: _I64.unpack(self._take(8))[0],
            b"I": lambda: int.from_bytes(self._sized(), "little", signed=True),
            b"f": lambda: _F64.unpack(self._take(8))[0],
            b"s": lambda: self._sized().decode("utf-8", "surrogatepass"),
            b"b": self._sized,
            b"R": lambda: np.frombuffer(self._sized(), "<f8").tolist(),
            b"L": lambda: np.frombuffer(self._sized(), "<i8").tolist(),
            b"l": lambda: [self.read() for _ in range(self._count())],
            b"t": lambda: tuple(self.read() for _ in range(self._count())),
            b"d": lambda: {self.read(): self.read() for _ in range(self._count())},
            b"r": self._record,
            b"m": lambda: self.records[self._count()],
            b"e": self._tensor,
            b"a": self._array,
            b"A": lambda: self._array()[()],
        }

    def read(self) -> Any:
        tag = self._take(1)
        if tag not in self.kinds:
            raise ValueError(f"unknown tag {tag!r}")
        return self.kinds[tag]()

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes expected, {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def _count(self) -> int:
        return int(_U64.unpack(self._take(8))[0])

    def _sized(self) -> bytes:
        return self._take(self._count())

    def _record(self) -> Any:
        kind = RECORDS[self._sized().decode()]
        number = len(self.records)
        self.records.append(None)  # numbered as it was begun, before records inside it
        record = kind(**{self.read(): self.read() for _ in range(self._count())})
        self.records[number] = record
        return record

    def _tensor(self) -> torch.Tensor:
        dtype = DTYPES[self._sized().decode()]
        shape, data = self._shaped()
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(shape)

    def _array(self) -> np.ndarray:
        dtype = np.dtype(self._sized().decode())
        if dtype.kind not in NUMPY_KINDS:
            raise ValueError(f"an array of {dtype}")
        shape, data = self._shaped()
        return np.frombuffer(bytearray(data), dtype=dtype).reshape(shape)

    def _shaped(self) -> tuple[list[int], bytes]:
        return self.read(), self.read()
