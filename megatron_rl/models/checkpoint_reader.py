"""Megatron distributed checkpoints (``torch_dist``): tensors out of one without building a model.

`stored_tensors` says which tensors there are; `stored_chunks` reads parts of them.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.checkpoint_digests import COMMON
from megatron_rl.models.inert_load import load_inert
from megatron_rl.models.layouts import megatron_layout
from megatron_rl.models.legacy_checkpoint import FILE, LegacyCheckpoint, unknown_tensors
from megatron_rl.models.lora_update import SUFFIX, merged
from megatron_rl.models.stored_chunks import StoredChunks
from megatron_rl.models.stored_tensors import Stored, candidates
from megatron_rl.models.transposed_experts import is_transposed
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard.layout import Layout, Shard
from megatron_rl.reshard.rectangle import Rectangle

LATEST = "latest_checkpointed_iteration.txt"  # Megatron-LM's pointer from a run's folder to its newest checkpoint
RELEASE = "release"  # what it says for weights that no training step has changed yet; also the name of their folder
MODEL_PARTS = ("embedding.", "decoder.", "encoder.", "output_layer.", "mtp.")  # what a GPTModel's tensors begin with


def checkpoint_folder(path: str | Path) -> Path | None:
    """The folder of one checkpoint: ``path`` itself, or the newest iteration of a Megatron-LM run; None where there is
    none.

    Raises:
        ConfigError: a run's pointer leads nowhere, or there is none among several iterations.
    """
    folder = Path(path).expanduser()
    pointer = folder / LATEST
    if pointer.is_file():
        iteration = pointer.read_text().strip()
        found = folder / (f"iter_{int(iteration):07d}" if iteration.isdigit() else iteration)
        if not iteration or not _is_checkpoint(found):
            raise ConfigError(
                f"{pointer} says {iteration!r}, but {found} holds no checkpoint: restore it, or give the folder of "
                "another iteration"
            )
        return found
    if _is_checkpoint(folder):
        return folder
    iterations = sorted(found.name for found in folder.glob("iter_*") if _is_checkpoint(found))
    if iterations:
        raise ConfigError(f"{folder} has {', '.join(iterations)} but no {LATEST}: give the folder of one of them")
    return None


def point_to(folder: Path) -> None:
    """Point the run of the iteration ``folder`` to it, unless the run has a pointer already."""
    pointer = folder.parent / LATEST
    if not pointer.exists():
        name = folder.name
        pointer.write_text(str(int(name.removeprefix("iter_"))) if name.startswith("iter_") else name)


def _is_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (".metadata", "metadata.json")) or _is_legacy(folder)


def _is_legacy(folder: Path) -> bool:
    return any(folder.glob(f"mp_rank_*/{FILE}"))


def open_checkpoint(path: str | Path) -> CheckpointReader | LegacyCheckpoint:
    """Read a checkpoint of either format that Megatron-LM trains with, ``torch_dist`` or ``torch``.

    Raises:
        ConfigError: there is none, or it is of another format.
    """
    folder = checkpoint_folder(path)
    return LegacyCheckpoint(folder) if folder is not None and _is_legacy(folder) else CheckpointReader(path)


class CheckpointReader:
    """Reads single parameters of a checkpoint, in one process and without process groups.

    Raises:
        ConfigError: ``path`` holds no distributed checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        folder = checkpoint_folder(path)
        if folder is None:
            raise ConfigError(
                f"{path} holds no Megatron distributed checkpoint (.metadata): expected a folder that "
                "megatron.core.dist_checkpointing.save wrote, in format torch_dist"
            )
        if not ((folder / ".metadata").is_file() and (folder / "metadata.json").is_file()):
            raise ConfigError(
                f"{folder} is a checkpoint of another format than torch_dist and torch: load it in Megatron-LM and "
                "save it with --ckpt-format torch_dist"
            )
        self.folder = folder
        self._merged = functools.lru_cache(2)(lambda shard: self.read(shard))  # its parts are asked for in turn
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored = metadata.state_dict_metadata.items()
        self.tensors = {key: entry for key, entry in stored if isinstance(entry, TensorStorageMetadata)}
        self._chunks = StoredChunks(folder, self.tensors, metadata.storage_data)

    ranks = (0,)  # of `layout`

    @functools.cached_property
    def arguments(self) -> Namespace | None:
        """The arguments of the Megatron-LM job that wrote it; None for another program's checkpoint."""
        common = load_inert(self.folder / COMMON) if (self.folder / COMMON).is_file() else {}
        found = common.get("args") if isinstance(common, dict) else None
        return found if isinstance(found, Namespace) else None

    def layout(self, architecture: Architecture) -> Layout:
        """The one-rank layout that the checkpoint is read in.

        Raises:
            ConfigError: a stored tensor has no place in the model.
        """
        layout = megatron_layout(architecture, RankGrid(ParallelSizes(), 1), self.padded_vocab)
        known = {stored.key for shard in layout.shards(0) for stored in candidates(shard.name)}
        extra = [k for k in self.tensors if k.startswith(MODEL_PARTS) and f"{SUFFIX}." not in k and k not in known]
        # A value head may stand in the place of the output layer.
        extra = [key for key in extra if key != "output_layer.weight" or self.tensors[key].size[0] > 1]
        if extra:
            raise ConfigError(unknown_tensors(self.folder, sorted(extra)))
        return layout

    @property
    def padded_vocab(self) -> int:
        return int(self._stored("embedding.word_embeddings.weight").size[0])

    @property
    def dtype(self) -> torch.dtype:
        return self._stored("embedding.word_embeddings.weight").properties.dtype

    def load_part(self, rank: int, shard: Shard, part: Rectangle) -> Tensor:
        """A rectangle of what `read` returns, seen as a matrix."""
        key, index = self._find(shard)
        if not self._has_adapter(key):
            return self._read(Stored(key, index), shard.shape, part)
        matrix = self._merged(shard).view(shard.matrix_shape)
        return matrix[part.slices]

    def read(self, shard: Shard) -> Tensor:
        """The tensor of a shard of the one-rank layout, named as the local spec names it; its adapter, if it has one,
        merged.

        Raises:
            ConfigError: the checkpoint lacks it, or has it in another shape.
        """
        key, index = self._find(shard)
        return self._with_adapter(key, index, self._read(Stored(key, index), shard.shape), shard)

    def _find(self, shard: Shard) -> Stored:
        """Where the tensor of a shard lies."""
        for key, index in candidates(shard.name):
            if key in self.tensors:
                sizes = tuple(self.tensors[key].size)
                if sizes[len(index) :] != shard.shape or any(i >= n for i, n in zip(index, sizes, strict=False)):
                    raise ConfigError(
                        f"{self.folder}: {key} has shape {list(sizes)}, but {shard.name} of the config has "
                        f"{list(shard.shape)}: the config belongs to another model"
                    )
                return Stored(key, index)
        raise ConfigError(f"{self.folder} lacks {shard.name}; it has {', '.join(sorted(self.tensors)[:3])} ...")

    def dtype_of(self, rank: int, shard: Shard) -> torch.dtype:
        """The dtype that a shard's tensor is stored in; there is one rank."""
        stored = next((self.tensors[one.key] for one in candidates(shard.name) if one.key in self.tensors), None)
        return self.dtype if stored is None else stored.properties.dtype

    @property
    def has_adapters(self) -> bool:
        """Whether it was written by a run that trained adapters."""
        return any(f"{SUFFIX}." in key for key in self.tensors)

    def _has_adapter(self, key: str) -> bool:
        return key.removesuffix(".weight") + f"{SUFFIX}.a" in self.tensors

    def _with_adapter(self, key: str, place: tuple[int, ...], weight: Tensor, shard: Shard) -> Tensor:
        if not self._has_adapter(key):
            return weight
        prefix = key.removesuffix(".weight") + SUFFIX
        names = [f"{prefix}.{part}" for part in ("a", "b", "scale")]
        shapes = [tuple(self._stored(name).size)[len(place) :] for name in names]
        a, b, scale = (self._read(Stored(name, place), shape) for name, shape in zip(names, shapes, strict=True))
        if is_transposed(shard.spans[0].tensor):
            a, b = b.T, a.T
        return merged(weight, a, b, scale if scale.numel() > 1 else float(scale))

    def _stored(self, key: str) -> TensorStorageMetadata:
        if key not in self.tensors:
            raise ConfigError(f"{self.folder} lacks {key}: it is no checkpoint of a whole language model")
        return self.tensors[key]

    def _read(self, stored: Stored, shape: tuple[int, ...], part: Rectangle | None = None) -> Tensor:
        matrix = self._chunks.read(stored.key, stored.place, shape, part)
        return matrix.view(shape) if part is None else matrix
