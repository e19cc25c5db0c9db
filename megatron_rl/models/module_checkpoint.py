"""Checkpoints of runs under FSDP2: the same format as Megatron-Core's, with tensors named as a module has them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.checkpoint_digests import COMMON
from megatron_rl.models.checkpoint_reader import CheckpointReader
from megatron_rl.models.inert_load import load_inert
from megatron_rl.models.layouts import transformers_layout
from megatron_rl.models.lora_update import merged
from megatron_rl.models.stored_tensors import Stored
from megatron_rl.reshard.layout import Layout, Shard
from megatron_rl.reshard.rectangle import Rectangle

MODEL = "actor_model/"  # before the names of a policy's tensors; see `engines.megatron.checkpoint.dtensors`
ADAPTER = ".lora.weight_"  # between the names of a layer and of its adapter's matrices


class ModuleCheckpoint(CheckpointReader):
    """Reads single tensors of the module that such a run trained."""

    @staticmethod
    def fits(reader: CheckpointReader) -> bool:
        """Whether a checkpoint is such a run's."""
        return any(key.startswith(MODEL) for key in reader.tensors)

    def layout(self, architecture: Architecture) -> Layout:
        return transformers_layout(architecture)

    @property
    def dtype(self) -> torch.dtype:
        return next(entry.properties.dtype for key, entry in self.tensors.items() if key.startswith(MODEL))

    def read(self, shard: Shard) -> Tensor:
        """The tensor of a shard of `layout`, or one of `ADAPTER`; its adapter, if it has one, merged.

        Raises:
            ConfigError: the checkpoint lacks it, or has it in another shape.
        """
        key = MODEL + shard.name
        if key not in self.tensors and shard.name in self._counters["buffers"]:
            return self._counters["buffers"][shard.name]
        sizes = tuple(self._stored(key).size)
        if sizes != shard.shape:
            raise ConfigError(
                f"{self.folder}: {key} has shape {list(sizes)}, but {shard.name} of the config has "
                f"{list(shard.shape)}: the config belongs to another model"
            )
        weight = self._read(Stored(key, ()), sizes)
        names = [f"{key.removesuffix('.weight')}{ADAPTER}{part}" for part in "ab"]
        if names[0] not in self.tensors:
            return weight
        a, b = (self._read(Stored(name, ()), tuple(self._stored(name).size)) for name in names)
        factor = self._counters["lora_factor"]
        return merged(weight, a, b, factor[shard.name] if isinstance(factor, dict) else factor)

    def load_part(self, rank: int, shard: Shard, part: Rectangle) -> Tensor:
        """As there; a module's tensors are read whole."""
        matrix = self._merged(shard).reshape(shard.matrix_shape)
        return matrix[part.slices]

    def dtype_of(self, rank: int, shard: Shard) -> torch.dtype:
        return self.read(shard).dtype if MODEL + shard.name not in self.tensors else self.dtype

    @property
    def has_adapters(self) -> bool:
        return any(ADAPTER in key for key in self.tensors)

    @functools.cached_property
    def _counters(self) -> dict[str, Any]:
        found: dict[str, Any] = load_inert(self.folder / COMMON)["actor_counters"]
        return found
