"""What a model may be named by: a Hugging Face folder, id or model, or a Megatron checkpoint of any layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_rl.models.hf_config import read_hf_config
from megatron_rl.weights.hf_in import resolve_folder
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_rl.weights.source import SafetensorsFolder

if TYPE_CHECKING:
    from megatron_rl.models.hf_config import HFConfig, HFModel

EMBEDDING = "model.embed_tokens.weight"  # of a Hugging Face folder


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
        return copy.deepcopy(source.hf_config)
    return copy.deepcopy(source.config)


def dtype_of(source: Path | HFModel | MegatronCheckpoint) -> torch.dtype:
    """What the weights of a resolved source are stored in; the embedding stands for all of them."""
    if isinstance(source, MegatronCheckpoint):
        return source.reader.dtype
    if isinstance(source, Path):
        with SafetensorsFolder(source) as stored:
            return stored.dtype(EMBEDDING)
    return source.get_input_embeddings().weight.dtype  # type: ignore[union-attr, return-value]
