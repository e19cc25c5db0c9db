"""`TensorSource`: anywhere logical tensors can be read from, one rectangle at a time.

`SafetensorsFolder` reads only the bytes of the rectangles that are asked for, so no rank ever holds the whole model.
`InMemory` views the tensors of a Hugging Face model or state dict.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.reshard.layout import Layout, Shard, Span, matrix_shape

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


class InMemory:
    """Tensors of a Hugging Face model in memory, under the names of its state dict.

    Args:
        tensors: name -> tensor.
        layout: how the logical tensors sit in them (`models.hf_layout`, `models.transformers_layout`), for ``rank``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout, rank: int = 0) -> None:
        self.tensors = tensors
        self.places: dict[str, tuple[Shard, Span]] = {}
        for shard in layout.shards(rank):
            if shard.name in tensors:
                check_shape(shard.name, tuple(tensors[shard.name].shape), shard.shape, layout.name)
                self.places |= {span.tensor: (shard, span) for span in shard.spans}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.places

    def read(self, span: Span) -> Tensor:
        shard, place = self.places[span.tensor]
        rows = slice(place.row + span.row_start, place.row + span.row_stop)
        cols = slice(place.col + span.col_start, place.col + span.col_stop)
        return self.tensors[shard.name].detach().reshape(shard.matrix_shape)[rows, cols]


class SafetensorsFolder:
    """A Hugging Face folder with one ``model.safetensors`` or several behind an index; a context manager.

    Raises:
        ConfigError: no safetensors, or a file is missing or corrupt; the message names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _weight_map(self.folder)
        self._open: dict[Path, Any] = {}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._open.values():
            handle.__exit__(kind, error, at)
        self._open.clear()

    def names(self) -> Iterable[str]:
        return self.files.keys()

    def read(self, span: Span) -> Tensor:
        path = self.files[span.tensor]
        try:
            part = self._handle(path).get_slice(span.tensor)
        except SafetensorError as error:
            raise ConfigError(f"{path} holds no readable {span.tensor!r} ({error}): restore the file") from None
        shape = tuple(part.get_shape())
        rows, cols = matrix_shape(shape)
        if len(shape) > 2 or span.row_stop > rows or span.col_stop > cols:
            raise ConfigError(
                f"{path}: {span.tensor} has shape {list(shape)}, but the config needs rows up to {span.row_stop} and "
                f"columns up to {span.col_stop}: config.json and the weights do not belong together"
            )
        chosen = part[span.row_start : span.row_stop]
        if len(shape) == 2:
            chosen = part[span.row_start : span.row_stop, span.col_start : span.col_stop]
        return chosen.reshape(span.num_rows, span.num_cols)

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self._handle(self.files[tensor]).get_slice(tensor).get_shape())

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        return self._open[path]


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist, but the folder's index names it: download it again") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file ({error}): download it again") from None


def _weight_map(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{index} is not a safetensors index ({error!r}): restore the file") from None
        return {name: folder / file for name, file in weight_map.items()}
    if single.is_file():
        return dict.fromkeys(_open_safetensors(single).keys(), single)
    other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    if other:
        raise ConfigError(
            f"{folder} has {other[0]} but no safetensors; pickled weights are not read, they can run code: "
            "load the model with transformers and save_pretrained() it, which writes safetensors"
        )
    raise ConfigError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: expected a Hugging Face model folder")
