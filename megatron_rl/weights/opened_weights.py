"""`open_weights`: what model a Hugging Face folder, a Megatron checkpoint or a folder of adapters holds, and a source
of its tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_rl.config import ConfigError
from megatron_rl.models.checkpoint_reader import CheckpointReader
from megatron_rl.models.components.embedding import SCORE
from megatron_rl.models.hf_config import (
    described_architecture,
    read_generation,
    read_hf_config,
    read_json_object,
)
from megatron_rl.models.layouts import logical_tensors
from megatron_rl.models.parameters import whole
from megatron_rl.models.peft_adapters import PeftAdapters
from megatron_rl.models.peft_config import CONFIG_FILE
from megatron_rl.models.tokenizer import check_stored_vocabulary, load_tokenizer
from megatron_rl.reshard import WireFormat
from megatron_rl.weights.hf_folder import HFDescription
from megatron_rl.weights.hf_in import check_folder, resolve_folder
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_rl.weights.merged_adapters import MergedAdapters
from megatron_rl.weights.source import SafetensorsFolder, TensorSource, dtypes_of
from megatron_rl.weights.value_head_file import SHARED_VALUE_HEAD, read_value_head


@dataclass(frozen=True)
class OpenedWeights:
    """A model to convert."""

    description: HFDescription
    tensors: TensorSource
    dtypes: WireFormat
    value_head: Tensor | None = None  # [1, hidden], of a policy that a critic shares its weights with
    checkpoint: Path | None = None  # the Megatron checkpoint that it is


@contextlib.contextmanager
def open_weights(path: str | Path, config: str | Path | None = None, drop_mtp: bool = False) -> Iterator[OpenedWeights]:
    """A Hugging Face folder, a model id, a Megatron checkpoint, or a PEFT folder, which is merged into its base.

    Args:
        config: for a checkpoint that carries none: the Hugging Face folder (or its config.json) that describes it; for
            a PEFT folder: its base, where that is not the one that it names.
        drop_mtp: leave out layers of multi-token prediction, which otherwise are refused.

    Raises:
        ConfigError: it is none of them, nothing says what model the checkpoint holds, or an adapter does not fit its
            base.
    """
    given = Path(path).expanduser()
    if (given / CONFIG_FILE).is_file() and not (given / "config.json").is_file():
        with open_weights(config or _base_of(given), drop_mtp=drop_mtp) as base:
            adapters = PeftAdapters(path, base.description.architecture)
            yield replace(base, tensors=MergedAdapters(base.tensors, adapters))
        return
    checkpoint = MegatronCheckpoint.find(path, config, flag="--config")
    if checkpoint is None:
        folder = resolve_folder(path)
        if config is not None:
            raise ConfigError(
                f"--config {config} describes a Megatron checkpoint, but {path} is a Hugging Face folder, which "
                "describes itself: leave --config out"
            )
        description = _describe(folder)
        with SafetensorsFolder(folder) as source:
            check_folder(source, description.architecture, drop_mtp)
            head = read_value_head(folder, description.architecture.hidden)
            dtypes = dtypes_of(source, logical_tensors(description.architecture))
            yield OpenedWeights(description, source, dtypes, head)
        return
    reader, description, head = checkpoint.reader, checkpoint.description, None
    if isinstance(reader, CheckpointReader) and any(key.endswith(SHARED_VALUE_HEAD) for key in reader.tensors):
        head = reader.read(whole(SHARED_VALUE_HEAD, SCORE, (1, description.architecture.hidden)))
    dtypes = dtypes_of(checkpoint.source, logical_tensors(description.architecture))
    yield OpenedWeights(description, checkpoint.source, dtypes, head, checkpoint.folder)


def _describe(folder: Path) -> HFDescription:
    config = read_hf_config(folder)
    architecture = described_architecture(config)
    tokenizer: PreTrainedTokenizerBase | None = None
    if architecture.value_model and (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(folder)  # it knows which token pads, which a classifier's config names
    check_stored_vocabulary(folder, architecture.vocab)
    return HFDescription(architecture, config, tokenizer, read_generation(folder), folder)


def _base_of(folder: Path) -> str:
    """The base that a PEFT folder names."""
    found = read_json_object(folder / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(found, str) or not found:
        raise ConfigError(f"{folder / CONFIG_FILE} names no base_model_name_or_path: give the base as --config FOLDER")
    return found
