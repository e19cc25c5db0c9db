"""Hugging Face weights into any layout: from a folder, reading only what this rank holds, or from a model in memory.

Both ends are data: ``fill(layout, rank, tensors, source)`` writes the rectangles of one rank. These functions find
the source and say what is wrong with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_config import architecture_from_hf, read_hf_config
from megatron_rl.models.layouts import hf_layout, logical_tensors, transformers_layout
from megatron_rl.reshard.layout import Layout
from megatron_rl.weights.fill import fill
from megatron_rl.weights.source import SafetensorsFolder, TensorSource, in_memory

logger = logging.getLogger(__name__)

SCORE = "score.weight"  # the head of a sequence classifier
NEEDED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve_folder(name: str | Path) -> Path:
    """A local folder as it is, anything else as a model id on the Hugging Face Hub (downloaded into its cache).

    Raises:
        ConfigError: it is neither, or the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(name).count("/") != 1:
        raise ConfigError(f"{name} is neither a folder nor a model id like 'Qwen/Qwen3-0.6B': correct the path")
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(NEEDED_FILES)))
    except Exception as error:
        raise ConfigError(f"{name} is not a local folder, and the Hugging Face Hub gave: {error}") from error


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder."""
    return architecture_from_hf(read_hf_config(folder))


def load_folder(
    folder: str | Path,
    layout: Layout,
    rank: int,
    tensors: Mapping[str, Tensor],
    architecture: Architecture | None = None,
) -> None:
    """Fill the tensors of ``rank`` from a folder's safetensors, reading only the rectangles that ``layout`` gives it.

    Args:
        tensors: the layout's local names -> tensors, any dtype and device, written in place
            (`models.chunk_tensors` gives those of a Megatron model).
        architecture: what the folder must hold; None = the language model that its config describes.

    Raises:
        ConfigError: the folder's files, the config and the layout do not fit together; the message names the file.
    """
    with SafetensorsFolder(folder) as source:
        expected = logical_tensors(architecture or read_architecture(folder))
        _check_folder(source, expected)
        fill(layout, rank, tensors, source)


def holds_scores(folder: str | Path) -> bool:
    """Whether a folder is a sequence classifier with one label, which is to say a reward model.

    Raises:
        ConfigError: it is a classifier of several labels.
    """
    with SafetensorsFolder(folder) as source:
        if SCORE not in source:
            return False
    require_one_label(read_hf_config(folder), str(folder))
    return True


def require_one_label(config: PretrainedConfig, where: str) -> None:
    """Raise ConfigError unless the classifier gives one number."""
    if config.num_labels != 1:
        raise ConfigError(
            f"{where} is a sequence classifier of {config.num_labels} labels: a reward model has num_labels=1"
        )


def _check_folder(source: SafetensorsFolder, expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = sorted(expected.keys() - source.files.keys())
    if missing:
        raise ConfigError(
            f"{source.folder} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}: "
            "the download is incomplete, or config.json belongs to another model"
        )
    # Two harmless kinds of surplus: a tied head that was stored all the same, and buffers that are recomputed.
    extra = [n for n in source.names() if n not in expected and n != "lm_head.weight" and "rotary_emb" not in n]
    if extra:
        logger.warning("%s: %d tensors are not used, first %s", source.folder, len(extra), sorted(extra)[0])


def model_source(model: PreTrainedModel) -> tuple[Architecture, TensorSource]:
    """The architecture of a Hugging Face model in memory, and its weights as a source for `fill`.

    Raises:
        ConfigError: its family is not supported, or it is a classifier of several labels.
    """
    architecture = architecture_from_hf(model.config)
    if SCORE in model.state_dict():
        require_one_label(model.config, type(model).__name__)
        architecture = replace(architecture, score_head=True)
    return architecture, state_source(architecture, dict(model.state_dict()))


def state_source(architecture: Architecture, state: Mapping[str, Tensor]) -> TensorSource:
    """A Hugging Face state dict as a source: in the form of files, or of `transformers` in memory (stacked experts)."""
    layout = transformers_layout(architecture)
    if any(shard.name not in state for shard in layout.shards(0)):
        layout = hf_layout(architecture)
    return in_memory(state, layout)
