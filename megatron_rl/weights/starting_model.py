"""What a model can be started from: a Hugging Face folder, id or model, or a Megatron checkpoint of any layout."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import NoFamilyError
from megatron_rl.models.hf_config import architecture_from_hf, read_hf_config
from megatron_rl.models.layouts import logical_tensors
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.reshard import WireFormat
from megatron_rl.weights.hf_in import model_source, read_architecture, resolve_folder
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_rl.weights.source import SafetensorsFolder, dtypes_of

if TYPE_CHECKING:
    from megatron_rl.models.hf_config import HFConfig, HFModel


def is_hf_model(model: Any) -> bool:
    """Whether ``model`` is a Hugging Face folder or model, or a checkpoint; else it is a job's own chunks."""
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


def family_architecture(source: Path | HFModel | MegatronCheckpoint, value_model: bool = False) -> Architecture:
    """The architecture of a resolved source that is a family's model, with nothing of its own.

    Raises:
        NoFamilyError: it is another model, and how.
    """
    if isinstance(source, Path):
        architecture = architecture_from_hf(read_hf_config(source))
    elif isinstance(source, MegatronCheckpoint):
        architecture = source.architecture
        if isinstance(architecture, ModuleArchitecture):
            raise NoFamilyError(f"model type {architecture.family!r} is not supported: it has no family here")
    else:
        architecture, _ = model_source(source)
    return replace(architecture, value_model=value_model)


def stored_dtypes(source: Path | HFModel | MegatronCheckpoint) -> WireFormat:
    """What the weights of a resolved source are stored in; the embedding's dtype stands for most of them."""
    if isinstance(source, MegatronCheckpoint):
        return dtypes_of(source.source, logical_tensors(source.architecture))
    if isinstance(source, Path):
        with SafetensorsFolder(source) as stored:
            return dtypes_of(stored, logical_tensors(read_architecture(source)))
    architecture, weights = model_source(source)
    return dtypes_of(weights, logical_tensors(architecture))
