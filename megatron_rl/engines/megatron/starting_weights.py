"""Filling a Megatron model with its first weights: from a Hugging Face folder or model, or a Megatron checkpoint of any
layout.

A value head is looked for under each name that it may have there; a source without one leaves it at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_rl.config import ConfigError
from megatron_rl.engines.megatron.engine import MegatronEngine
from megatron_rl.engines.megatron.model.model_chunk import unwrap
from megatron_rl.models.checkpoint_reader import CheckpointReader
from megatron_rl.models.components.embedding import SCORE
from megatron_rl.models.legacy_checkpoint import LegacyCheckpoint
from megatron_rl.models.parameters import whole
from megatron_rl.weights.fill import fill
from megatron_rl.weights.hf_in import holds_scores, load_folder, model_source
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_rl.weights.value_head_file import SHARED_VALUE_HEAD, read_value_head

if TYPE_CHECKING:
    from megatron_rl.models.hf_config import HFModel

OUTPUT_LAYER = "output_layer.weight"  # of chunks and checkpoints: a value head may stand in its place


def fill_model(model: MegatronEngine, source: Path | HFModel | MegatronCheckpoint) -> bool:
    """Fill a fresh model; each rank reads only its part of files.

    Returns:
        False where the source has no value head and the model's stays zero.
    """
    if isinstance(source, MegatronCheckpoint):
        return load_megatron_checkpoint(model, source)
    rank, tensors, has_head = model.context.rank, model.tensors(), not model.value_model
    if isinstance(source, Path):
        has_head = has_head or holds_scores(source)
        stored = model.architecture if has_head else replace(model.architecture, value_model=False)
        load_folder(source, model.layout_of(has_head), rank, tensors, stored)
        if not has_head or model.shared_value_head:
            has_head = _set_value_head(model, read_value_head(source, model.architecture.hidden))
        return has_head
    found, weights = model_source(source)
    has_head = has_head or found.value_model
    fill(model.layout_of(has_head), rank, tensors, weights)
    return has_head and not model.shared_value_head


def _set_value_head(model: MegatronEngine, weight: torch.Tensor | None) -> bool:
    """Write ``weight`` into the value head on the last pipeline stage; False where it is None."""
    own = model.parameters().get(model.last_prefix + (OUTPUT_LAYER if model.value_model else SHARED_VALUE_HEAD))
    if weight is not None and own is not None:
        with torch.no_grad():
            own.copy_(weight)
    return weight is not None


def load_megatron_checkpoint(model: MegatronEngine, checkpoint: MegatronCheckpoint) -> bool:
    """Fill bare chunks from a Megatron checkpoint, whatever layout wrote it. Collective.

    Returns:
        As `fill_model`.

    Raises:
        ConfigError: it holds another model than it is described as, or is that of a run with adapters.
    """
    folder, reader = checkpoint.folder, checkpoint.reader
    if reader.has_adapters:
        raise ConfigError(
            f"{folder} is the checkpoint of a run that trained adapters (LoRA): `megatron-rl convert {folder} FOLDER "
            "--to hf` merges them into the weights; start from that folder"
        )
    own = OUTPUT_LAYER if model.value_model else SHARED_VALUE_HEAD if model.shared_value_head else None
    stored = None if own is None or isinstance(reader, LegacyCheckpoint) else _stored_value_head(reader.tensors)
    names = [f"model{index}" if len(model.chunks) > 1 else "model" for index in range(len(model.chunks))]
    template = {name: unwrap(chunk).sharded_state_dict() for name, chunk in zip(names, model.chunks, strict=True)}
    zero = {}
    for name, entries in template.items():
        if own in entries and stored is None:
            zero[name] = {own: entries.pop(own).data}
        elif own in entries:
            entries[own].key = stored
    reader.layout(checkpoint.architecture)  # refuses what has no place in the model
    here = not isinstance(reader, LegacyCheckpoint) and _has_all(reader, template.values())
    if not all(model.context.gather_objects(here)):
        _fill_from_parts(model, checkpoint, stored)
        return own is None or stored is not None
    state = dist_checkpointing.load(template, str(folder))
    for name, chunk in zip(names, model.chunks, strict=True):
        unwrap(chunk).load_state_dict(state[name] | zero.get(name, {}))
    return own is None or stored is not None


def _has_all(reader: CheckpointReader, parts: Iterable[Mapping[str, Any]]) -> bool:
    """Whether every tensor is stored under the name that Megatron-Core gives it in this model. Layers of experts are
    not where one side stacks them into one tensor and the other does not."""
    entries = (entry for part in parts for entry in part.values())
    return all(
        entry.key in reader.tensors for entry in entries if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    )


def _fill_from_parts(model: MegatronEngine, checkpoint: MegatronCheckpoint, head: str | None) -> None:
    """Fill a model tensor by tensor, as from a Hugging Face folder; ``head`` is the stored value head's name."""
    fill(model.layout_of(not model.value_model), model.context.rank, model.tensors(), checkpoint.source)
    if head is not None and isinstance(checkpoint.reader, CheckpointReader):
        _set_value_head(model, checkpoint.reader.read(whole(head, SCORE, (1, model.architecture.hidden))))


def _stored_value_head(tensors: Mapping[str, Any]) -> str | None:
    """Which tensor of a checkpoint is a value head; a language model's output layer has a row for each token."""
    if OUTPUT_LAYER in tensors and tensors[OUTPUT_LAYER].size[0] == 1:
        return OUTPUT_LAYER
    return SHARED_VALUE_HEAD if SHARED_VALUE_HEAD in tensors else None
