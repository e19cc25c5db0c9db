"""`TensorSource`: anywhere logical tensors can be read from, one rectangle at a time.

`SafetensorsFolder` reads only the bytes of the rectangles that are asked for, so no rank ever holds the whole model.
`LayoutSource` finds them in the shards of any layout: a model in memory (`in_memory`), or a Megatron checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.models.safetensors_files import DTYPES, Entry, SafetensorsFile
from megatron_rl.reshard import WireFormat
from megatron_rl.reshard.layout import Layout, Shard, Span, matrix_shape
from megatron_rl.reshard.rectangle import Rectangle

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def check_shape(name: str, given: tuple[int, ...], expected: tuple[int, ...], where: str) -> None:
    """Raise ConfigError unless both shapes are equal."""
    if given != expected:
        raise ConfigError(f"{name} has shape {list(given)}, expected {list(expected)} in layout {where!r}")


class TensorSource(Protocol):
    """Logical tensors by name, seen as matrices (`reshard.layout.matrix_shape`)."""

    def __contains__(self, tensor: str) -> bool: ...

    def read(self, span: Span) -> Tensor:
        """The rectangle of ``span``: [num_rows, num_cols], in the source's dtype.

        Raises:
            ValueError: the tensor is missing or too small.
        """
        ...

    def dtype(self, tensor: str) -> torch.dtype:
        """The dtype that ``tensor`` is stored in."""
        ...


def dtypes_of(source: TensorSource, tensors: Iterable[str]) -> WireFormat:
    """What ``tensors``, as far as the source has them, are stored in; the first one's dtype stands for most."""
    found = {tensor: source.dtype(tensor) for tensor in tensors if tensor in source}
    most = next(iter(found.values()))
    return WireFormat(most, {tensor: dtype for tensor, dtype in found.items() if dtype != most})


class SpanLocation(NamedTuple):
    """Where a rectangle of a logical tensor lies."""

    rank: int
    shard: Shard
    span: Span


class LayoutSource:
    """Logical tensors that sit in the shards of some ranks of a layout.

    Args:
        layout: how the logical tensors sit in the shards of ``ranks``.
        ranks: which together hold all; of rectangles that several hold the first one's is read.
        load_part: fetches a rectangle of a rank's shard, as a matrix.
        dtype: of a rank's shard.
    """

    def __init__(
        self,
        layout: Layout,
        ranks: Iterable[int],
        load_part: Callable[[int, Shard, Rectangle], Tensor],
        dtype: Callable[[int, Shard], torch.dtype],
    ) -> None:
        self._added, self._dtype, self._load_part = layout.added, dtype, load_part
        self._locations: dict[str, list[SpanLocation]] = {}
        seen = set()
        for rank in ranks:
            for shard in layout.shards(rank):
                for span in shard.spans:
                    if (span.tensor, span.rectangle) not in seen:
                        seen.add((span.tensor, span.rectangle))
                        self._locations.setdefault(span.tensor, []).append(SpanLocation(rank, shard, span))

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._locations

    def dtype(self, tensor: str) -> torch.dtype:
        first = self._locations[tensor][0]
        return self._dtype(first.rank, first.shard)

    def read(self, span: Span) -> Tensor:
        pieces = [
            (common, location)
            for location in self._locations[span.tensor]
            if (common := span.rectangle.intersection(location.span.rectangle))
        ]
        if sum(common.numel for common, _ in pieces) != span.numel:
            raise ConfigError(f"the weights do not hold all of {span}: the config belongs to another model")
        tensors = [self._part(location, common) for common, location in pieces]
        if len(tensors) == 1:
            return tensors[0]
        result = tensors[0].new_empty(span.num_rows, span.num_cols)
        for (common, _), tensor in zip(pieces, tensors, strict=True):
            row, col = common.row_start - span.row_start, common.col_start - span.col_start
            result[row : row + common.num_rows, col : col + common.num_cols] = tensor
        return result

    def _part(self, location: SpanLocation, wanted: Rectangle) -> Tensor:
        held = location.span
        row, col = held.row + wanted.row_start - held.row_start, held.col + wanted.col_start - held.col_start
        added, place = self._added(held.tensor), wanted.moved(row, col)
        values = self._load_part(location.rank, location.shard, place)
        return values - added if added else values


def in_memory(tensors: Mapping[str, Tensor], layout: Layout, rank: int = 0) -> LayoutSource:
    """Tensors in memory as a source, without copies; ``layout`` says what their names and shapes hold.

    Raises:
        ConfigError: a tensor has another shape than the layout gives it.
    """
    present = [shard for shard in layout.shards(rank) if shard.name in tensors]
    for shard in present:
        check_shape(shard.name, tuple(tensors[shard.name].shape), shard.shape, layout.name)
    held = Layout(layout.name, {0: 0}, lambda replica: present, held=layout.held)

    def part(rank: int, shard: Shard, place: Rectangle) -> Tensor:
        matrix = tensors[shard.name].detach().reshape(shard.matrix_shape)
        return matrix[place.slices]

    return LayoutSource(held, (0,), part, lambda rank, shard: tensors[shard.name].dtype)


class SafetensorsFolder:
    """A Hugging Face folder with one ``model.safetensors`` or several behind an index; a context manager.

    Raises:
        ConfigError: no safetensors, or a file is missing or corrupt; the message names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _weight_map(self.folder)
        self._open: dict[Path, SafetensorsFile] = {}
        self._stored: dict[str, str] = {}  # name here -> name in the files, where it is another

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors otherwise than the files do: name in the files -> name here."""
        for stored, name in names.items():
            self.files[name] = self.files.pop(stored)
            self._stored[name] = stored

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything in the folder's files, whether or not the index names it.

        Raises:
            ConfigError: a tensor is in two files.
        """
        found: dict[str, tuple[int, ...]] = {}
        where: dict[str, Path] = {}
        for path in dict.fromkeys(self.files.values()):
            for name, entry in self._handle(path).entries.items():
                if name in where:
                    raise ConfigError(
                        f"{path} and {where[name].name} both hold {name} ({list(entry.shape)} and "
                        f"{list(found[name])}): remove one of them, so that it is known which counts"
                    )
                found[name], where[name] = entry.shape, path
        return found

    def names(self) -> Iterable[str]:
        return self.files.keys()

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape that ``tensor`` is stored in."""
        return self._entry(tensor).shape

    def read(self, span: Span) -> Tensor:
        path, entry = self.files[span.tensor], self._entry(span.tensor)
        rows, cols = matrix_shape(entry.shape)
        if span.row_stop > rows or span.col_stop > cols:
            raise ConfigError(
                f"{path}: {span.tensor} has shape {list(entry.shape)}, but the config needs rows up to {span.row_stop} "
                f"and columns up to {span.col_stop}: config.json and the weights do not belong together"
            )
        self.dtype(span.tensor)
        stored = self._stored.get(span.tensor, span.tensor)
        return self._handle(path).read(
            stored, range(span.row_start, span.row_stop), range(span.col_start, span.col_stop)
        )

    def check(self, tensor: str, expected: tuple[int, ...]) -> None:
        """Raise ConfigError unless ``tensor`` is stored unquantized and in exactly this shape."""
        path = self.files[tensor]
        self.dtype(tensor)
        shape = self._entry(tensor).shape
        if shape != expected:
            raise ConfigError(
                f"{path}: {tensor} has shape {list(shape)}, but config.json describes {list(expected)}: config.json "
                "and the weights do not belong together"
            )

    def dtype(self, tensor: str) -> torch.dtype:
        """The dtype ``tensor`` is stored in.

        Raises:
            ConfigError: it is missing, or stored in a format that is not floating point as torch has it.
        """
        if tensor not in self.files:
            raise ConfigError(f"{self.folder} lacks {tensor!r}: is it a language model's folder?")
        stored = self._entry(tensor).dtype
        if stored not in DTYPES:
            raise ConfigError(
                f"{self.files[tensor]}: {tensor} is stored as {stored}, expected one of {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def _entry(self, tensor: str) -> Entry:
        path, stored = self.files[tensor], self._stored.get(tensor, tensor)
        entries = self._handle(path).entries
        if stored not in entries:
            raise ConfigError(f"{path} holds no {stored!r}, but the folder's index says so: restore the file")
        return entries[stored]

    def _handle(self, path: Path) -> SafetensorsFile:
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        return self._open[path]


def _open_safetensors(path: Path) -> SafetensorsFile:
    try:
        return SafetensorsFile(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist, but the folder's index names it: download it again") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file ({error}): download it again") from None


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and bool(name) and Path(name).name == name


def _weight_map(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            wrong = [f"{n!r}: {f!r}" for n, f in weight_map.items() if not _is_file_name(f)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{index} is not a safetensors index ({error!r:.200}): restore the file") from None
        if wrong:
            raise ConfigError(f"{index}: {wrong[0]:.200} names no file of the folder: restore the file")
        return {name: folder / file for name, file in weight_map.items()}
    if single.is_file():
        file = _open_safetensors(single)
        file.close()
        return dict.fromkeys(file.entries, single)
    if parts := sorted(path.name for path in folder.glob("*.safetensors")):
        count = f"{len(parts)} safetensors files, {parts[0]} first," if len(parts) > 1 else parts[0]
        raise ConfigError(f"{folder} has {count} but no {INDEX_FILE}, which says what is where: download it as well")
    other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    if other:
        raise ConfigError(
            f"{folder} has {other[0]} but no safetensors; pickled weights are not read, they can run code: "
            "load the model with transformers and save_pretrained() it, which writes safetensors"
        )
    raise ConfigError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: expected a Hugging Face model folder")
