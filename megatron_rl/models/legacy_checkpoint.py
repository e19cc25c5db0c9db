"""Megatron-LM's checkpoints of the format ``torch``: one ``mp_rank_XX[_YYY][_EEE]/model_optim_rng.pt`` for each rank
of a model, holding its `GPTModel.state_dict()` (megatron/training/checkpointing.py get_checkpoint_name).

Pipeline stages and virtual stages are joined by counting layers, so any division of layers is read. What is left is
a grid of tensor- and expert-parallel ranks, which is a layout as any other. Files are mapped, not loaded.
"""

from __future__ import annotations

import functools
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.inert_load import load_inert
from megatron_rl.models.layouts import megatron_layout
from megatron_rl.models.naming import MegatronNaming
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard.layout import Layout, Shard
from megatron_rl.reshard.rectangle import Rectangle

FILE = "model_optim_rng.pt"
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER, VALUE_HEAD = "output_layer.weight", "value_head.weight"
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class LegacyGrid:
    """The layout of the job that wrote a checkpoint, as far as its files show it."""

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    world: int

    @classmethod
    def of(cls, arguments: Namespace) -> LegacyGrid:
        """From Megatron-LM's arguments."""
        given = vars(arguments)
        tp, pp, cp, ep = (
            given.get(f"{axis}_parallel_size") or 1
            for axis in ("tensor_model", "pipeline_model", "context", "expert_model")
        )
        etp = given.get("expert_tensor_parallel_size") or tp
        vpp = given.get("virtual_pipeline_model_parallel_size") or 1
        return cls(tp, pp, vpp, cp, ep, etp, given.get("world_size") or tp * pp * cp * ep)

    def ranks(self) -> dict[int, tuple[int, int]]:
        """The ranks of the first pipeline stage that wrote a file -> their (tensor-, expert-parallel) ranks, which
        name it: those that come first among the replicas of their experts.

        Raises:
            ConfigError: two such ranks with different experts have one name, so that one overwrote the other.
        """
        grid = self.stage
        ranks: dict[int, tuple[int, int]] = {}
        for rank in range(grid.world_size):
            at = grid.coordinates(rank)
            if at.edp == 0:
                if (at.tp, at.ep) in ranks.values():
                    raise ConfigError(
                        f"expert_tensor_parallel_size={self.etp} with tensor_model_parallel_size={self.tp}: the format "
                        "torch has one file for ranks with different experts: save with --ckpt-format torch_dist"
                    )
                ranks[rank] = (at.tp, at.ep)
        return ranks

    @property
    def stage(self) -> RankGrid:
        """The ranks of one pipeline stage."""
        sizes = ParallelSizes(tp=self.tp, cp=self.cp, ep=self.ep, etp=self.etp)
        return RankGrid(sizes, self.world // self.pp)

    def folder(self, tp: int, pp: int, ep: int) -> str:
        """The name of the folder that a rank's file lies in."""
        parts = [f"mp_rank_{tp:02d}"]
        parts += [f"{pp:03d}"] if self.pp > 1 else []
        parts += [f"{ep:03d}"] if self.ep > 1 else []
        return "_".join(parts)


class LegacyCheckpoint:
    """Tensors out of such a checkpoint; as `CheckpointReader`.

    Raises:
        ConfigError: a file is missing or unreadable, or the model is none of megatron.core.
    """

    has_adapters = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first = min(folder.glob(f"mp_rank_*/{FILE}"))
        content = self._load(first.parent.name)
        version, found = content.get("checkpoint_version", 0), content.get("args")
        if version < 3.0 or not isinstance(found, Namespace):
            raise ConfigError(
                f"{first} has checkpoint_version {version} and {'no ' if found is None else ''}arguments, expected "
                "3.0 and arguments: load it in Megatron-LM and save it again"
            )
        self.arguments: Namespace = found
        self.grid = LegacyGrid.of(found)
        self.coordinates = self.grid.ranks()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of `layout` that hold something."""
        return tuple(self.coordinates)

    @property
    def padded_vocab(self) -> int:
        return self._embedding.shape[0] * self.grid.tp

    def dtype_of(self, rank: int, shard: Shard) -> torch.dtype:
        """What the tensor of a shard is stored in."""
        return self.load(rank, shard).dtype

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def _embedding(self) -> Tensor:
        tensors = self.tensors_of(self.ranks[0])
        if EMBEDDING not in tensors:
            raise ConfigError(f"{self.folder} lacks {EMBEDDING}: it is no checkpoint of a whole language model")
        return tensors[EMBEDDING]

    def layout(self, architecture: Architecture) -> Layout:
        """Where the model's logical tensors sit in `tensors_of` each of `ranks`.

        Raises:
            ConfigError: the sizes do not fit, or a stored tensor has no place in the model.
        """
        try:
            naming = MegatronNaming.detect(self.tensors_of(self.ranks[0]))
        except ValueError as error:
            raise ConfigError(f"{self.folder}: {error}") from None
        layout = megatron_layout(architecture, self.grid.stage, self.padded_vocab, naming)
        for rank in self.ranks:
            known = {shard.name for shard in layout.shards(rank)}
            known |= {OUTPUT_LAYER} if architecture.tied else set()  # the last stage's copy of the embedding
            self._refuse_value_head(rank)
            extra = sorted(self.tensors_of(rank).keys() - known)
            if extra:
                raise ConfigError(unknown_tensors(self.folder, extra))
        return layout

    def _refuse_value_head(self, rank: int) -> None:
        """Raise ConfigError for a value head, in place of the output layer or beside it: it would stay zero."""
        tensors = self.tensors_of(rank)
        output = tensors.get(OUTPUT_LAYER)
        if VALUE_HEAD in tensors or (output is not None and output.shape[0] == 1):
            raise ConfigError(
                f"{self.folder} holds a value head, which is read from the format torch_dist only: save the model "
                "again with --ckpt-format torch_dist"
            )

    def load(self, rank: int, shard: Shard) -> Tensor:
        """The tensor of a shard of `layout`.

        Raises:
            ConfigError: it is missing, or has another shape.
        """
        tensors = self.tensors_of(rank)
        if shard.name not in tensors:
            raise ConfigError(f"{self.folder} lacks {shard.name}; it has {', '.join(sorted(tensors)[:3])} ...")
        if tuple(tensors[shard.name].shape) != shard.shape:
            raise ConfigError(
                f"{self.folder}: {shard.name} has shape {list(tensors[shard.name].shape)}, but the config makes it "
                f"{list(shard.shape)}: the config belongs to another model"
            )
        return tensors[shard.name]

    def load_part(self, rank: int, shard: Shard, part: Rectangle) -> Tensor:
        """A rectangle of it, seen as a matrix."""
        matrix = self.load(rank, shard).reshape(shard.matrix_shape)
        return matrix[part.slices]

    @functools.cache  # noqa: B019  a reader lives as long as one conversion
    def tensors_of(self, rank: int) -> dict[str, Tensor]:
        """What all pipeline stages of a tensor- and expert-parallel rank hold, layers numbered through the model."""
        tp, ep = self.coordinates[rank]
        files = [self._load(self.grid.folder(tp, pp, ep)) for pp in range(self.grid.pp)]
        tensors: dict[str, Tensor] = {}
        first_layer = 0
        for chunk in range(self.grid.vpp):
            for content in files:
                key = f"model{chunk}" if self.grid.vpp > 1 else "model"
                if not isinstance(content.get(key), Mapping):
                    raise ConfigError(f"{self.folder}: a file lacks {key!r}, expected for vpp={self.grid.vpp}")
                state = dict(self._of_chunk(content[key]))
                tensors |= {_renumbered(name, first_layer): tensor for name, tensor in state.items()}
                layers = {int(found[1]) for found in map(LAYER.match, state) if found}
                first_layer += max(layers) + 1 if layers else 0
        return tensors

    def _of_chunk(self, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        for name, value in state.items():
            if isinstance(value, Mapping):
                raise ConfigError(
                    f"{self.folder} holds {name!r}, a model from before megatron.core (--use-legacy-models): it is not "
                    "read; convert it with Megatron-LM's tools/checkpoint/convert.py"
                )
            if not name.rpartition(".")[2].startswith("_extra_state"):
                yield from _experts_apart(name, value, self.grid.ep, self.arguments)

    def _load(self, name: str) -> dict[str, Any]:
        content = load_inert(self.folder / name / FILE)
        if not isinstance(content, dict):
            raise ConfigError(f"{self.folder / name / FILE} holds a {type(content).__name__}, expected a checkpoint")
        return content


def _renumbered(name: str, first_layer: int) -> str:
    return LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) + first_layer}.", name)


def _experts_apart(name: str, tensor: Tensor, ep: int, arguments: Namespace) -> Iterator[tuple[str, Tensor]]:
    """The experts of a `GroupedMLP` (one transposed matrix for all: weight1 is ``[hidden, experts * 2 ffn]``, viewed as
    ``[experts, hidden, 2 ffn]``) as those of a `SequentialMLP`; anything else as it is."""
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith("mlp.experts") or last not in ("weight1", "weight2"):
        yield name, tensor
        return
    experts = arguments.num_experts // ep
    hidden = arguments.hidden_size
    stacked = tensor.view(experts, hidden, -1) if last == "weight1" else tensor.view(experts, -1, hidden)
    layer = "linear_fc1" if last == "weight1" else "linear_fc2"
    for index, matrix in enumerate(stacked):
        yield f"{prefix}.local_experts.{index}.{layer}.weight", matrix.t()


def unknown_tensors(folder: Path, names: list[str]) -> str:
    """The message for stored tensors that are not in the model."""
    shown = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
    return (
        f"{folder} holds {shown}, which the described model does not have: the config belongs to another model, or the "
        "checkpoint's has parts that no decoder here computes"
    )
