"""Where a model's first weights come from: a Hugging Face folder or model, or a Megatron checkpoint of any layout.

A value head is looked for under each name that it may have there; a source without one leaves it at zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import dist_checkpointing

from megatron_rl.config import ConfigError
from megatron_rl.models.checkpoint import CheckpointReader, checkpoint_folder
from megatron_rl.models.hf_config import read_hf_config
from megatron_rl.models.megatron_chunk import unwrap
from megatron_rl.weights.fill import fill
from megatron_rl.weights.hf_folder import DESCRIPTION_FOLDER
from megatron_rl.weights.hf_in import holds_scores, load_folder, model_source, resolve_folder
from megatron_rl.weights.source import SafetensorsFolder
from megatron_rl.weights.value_head_file import SECOND_HEAD, read_value_head

if TYPE_CHECKING:
    from megatron_rl.models.hf_config import HFConfig, HFModel
    from megatron_rl.workers.megatron_model import MegatronModel

EMBEDDING = "model.embed_tokens.weight"  # of a Hugging Face folder
OUTPUT_LAYER = "output_layer.weight"  # of chunks and checkpoints: a value head may stand in its place


@dataclass(frozen=True, slots=True)
class MegatronCheckpoint:
    """Weights in a Megatron distributed checkpoint, and the Hugging Face config.json that describes their model."""

    folder: Path
    config: Path

    @classmethod
    def find(cls, path: str | Path, config: str | Path | None = None) -> MegatronCheckpoint | None:
        """The checkpoint at ``path``, or the newest one of a Megatron-LM run there; None where there is none.

        Args:
            config: a Hugging Face folder or config.json, where the checkpoint does not carry its description itself.

        Raises:
            ConfigError: nothing says what model it holds.
        """
        folder = checkpoint_folder(path)
        if folder is None:
            return None
        described = Path(config) if config is not None else folder / DESCRIPTION_FOLDER
        if not described.exists():
            raise ConfigError(
                f"the Megatron checkpoint {folder} does not say what model it holds: set model_config_path to a "
                "Hugging Face folder or config.json of the same architecture"
            )
        return cls(folder, described)

    @property
    def hf_folder(self) -> Path:
        """The folder with config.json and, in checkpoints that carry their description, the tokenizer."""
        return self.config.parent if self.config.name == "config.json" else self.config


def is_hf_model(model: Any) -> bool:
    """Whether ``model`` is to be built here (a Hugging Face folder or model, or a checkpoint) rather than chunks."""
    return isinstance(model, (str, Path, MegatronCheckpoint)) or hasattr(model, "save_pretrained")


def resolved(source: str | Path | HFModel | MegatronCheckpoint) -> Path | HFModel | MegatronCheckpoint:
    """A path as the Megatron checkpoint or the Hugging Face folder that it is; a model id as its folder.

    Raises:
        ConfigError: a path is neither.
    """
    if isinstance(source, (str, Path)):
        return MegatronCheckpoint.find(source) or resolve_folder(source)
    return source


def hf_config_of(source: Path | HFModel | MegatronCheckpoint) -> HFConfig:
    """The Hugging Face config of a resolved source."""
    if isinstance(source, Path):
        return read_hf_config(source)
    if isinstance(source, MegatronCheckpoint):
        return read_hf_config(source.hf_folder)
    return copy.deepcopy(source.config)


def dtype_of(source: Path | HFModel | MegatronCheckpoint) -> torch.dtype:
    """What the weights of a resolved source are stored in; the embedding stands for all of them."""
    if isinstance(source, MegatronCheckpoint):
        return CheckpointReader(source.folder).dtype
    if isinstance(source, Path):
        with SafetensorsFolder(source) as stored:
            return stored.dtype(EMBEDDING)
    return source.get_input_embeddings().weight.dtype  # type: ignore[union-attr, return-value]


def fill_model(model: MegatronModel, source: Path | HFModel | MegatronCheckpoint) -> bool:
    """Fill a fresh model; each rank reads only its part of files.

    Returns:
        Whether the source has all of it; False = it has no value head, and the model's stays zero.
    """
    if isinstance(source, MegatronCheckpoint):
        return load_megatron_checkpoint(model, source.folder)
    rank, tensors, has_head = model.context.rank, model.tensors(), not model.value_head
    if isinstance(source, Path):
        has_head = has_head or holds_scores(source)
        stored = model.architecture if has_head else replace(model.architecture, score_head=False)
        load_folder(source, model.layout_of(has_head), rank, tensors, stored)
        if not has_head or model.second_head:
            has_head = _set_head(model, read_value_head(source, model.architecture.hidden))
        return has_head
    found, weights = model_source(source)
    has_head = has_head or found.score_head
    fill(model.layout_of(has_head), rank, tensors, weights)
    return has_head and not model.second_head


def _set_head(model: MegatronModel, weight: torch.Tensor | None) -> bool:
    """Give the last pipeline stage its value head; False where there is none to give."""
    own = model.parameters().get(model.last_prefix + (OUTPUT_LAYER if model.value_head else SECOND_HEAD))
    if weight is not None and own is not None:
        with torch.no_grad():
            own.copy_(weight)
    return weight is not None


def load_megatron_checkpoint(model: MegatronModel, folder: Path) -> bool:
    """Fill bare chunks from a Megatron distributed checkpoint, whatever layout wrote it. Collective.

    Returns:
        As `fill_model`.

    Raises:
        ConfigError: there is no checkpoint in ``folder``, or it is that of a run with adapters.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise ConfigError(
            f"{folder} holds no Megatron distributed checkpoint: expected a folder that "
            "megatron.core.dist_checkpointing.save wrote"
        )
    if CheckpointReader(folder).has_adapters:
        raise ConfigError(
            f"{folder} is the checkpoint of a run that trained adapters (LoRA): `megatron-rl convert {folder} FOLDER "
            "--to hf` merges them into the weights; start from that folder"
        )
    own = OUTPUT_LAYER if model.value_head else SECOND_HEAD if model.second_head else None
    stored = None if own is None else _stored_head(CheckpointReader(folder).tensors)
    names = [f"model{index}" if len(model.chunks) > 1 else "model" for index in range(len(model.chunks))]
    template = {name: unwrap(chunk).sharded_state_dict() for name, chunk in zip(names, model.chunks, strict=True)}
    zero = {}
    for name, entries in template.items():
        if own in entries and stored is None:
            zero[name] = {own: entries.pop(own).data}
        elif own in entries:
            entries[own].key = stored
    state = dist_checkpointing.load(template, str(folder))
    for name, chunk in zip(names, model.chunks, strict=True):
        unwrap(chunk).load_state_dict(state[name] | zero.get(name, {}))
    return own is None or stored is not None


def _stored_head(tensors: Mapping[str, Any]) -> str | None:
    """Which tensor of a checkpoint is a value head; a language model's output layer has a row for each token."""
    if OUTPUT_LAYER in tensors and tensors[OUTPUT_LAYER].size[0] == 1:
        return OUTPUT_LAYER
    return SECOND_HEAD if SECOND_HEAD in tensors else None
