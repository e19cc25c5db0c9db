"""Hugging Face weights into any layout: from a folder, reading only what this rank holds, or from a model in memory.

Both ends are data: ``fill(layout, rank, tensors, source)`` writes the rectangles of one rank. These functions find
the source and say what is wrong with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PretrainedConfig

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.components.embedding import SCORE
from megatron_rl.models.family import NoFamilyError, describe
from megatron_rl.models.hf_config import architecture_from_hf, read_hf_config
from megatron_rl.models.layers_behind import layers_behind, predicts_tokens
from megatron_rl.models.layouts import hf_layout, logical_tensors, transformers_layout
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.reshard.layout import Layout, Span
from megatron_rl.weights.file_copies import row_blocks
from megatron_rl.weights.fill import fill
from megatron_rl.weights.source import SafetensorsFolder, TensorSource, in_memory

if TYPE_CHECKING:  # see `hf_config`
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

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
            (`chunk_tensors` gives those of a Megatron model).
        architecture: what the folder must hold; None = the language model that its config describes.

    Raises:
        ConfigError: the folder's files, the config and the layout do not fit together; the message names the file.
    """
    with SafetensorsFolder(folder) as source:
        check_folder(source, architecture or read_architecture(folder))
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
    """Raise ConfigError unless the classifier has one label."""
    if config.num_labels != 1:
        raise ConfigError(
            f"{where} is a sequence classifier of {config.num_labels} labels: a reward model has num_labels=1"
        )


def check_folder(source: SafetensorsFolder, architecture: Architecture, drop_mtp: bool = True) -> None:
    """Compare the headers of a folder's files with the model that it should hold; unused tensors are warned about.

    Args:
        drop_mtp: layers of multi-token prediction are left out, which a warning says.

    Raises:
        ConfigError: a tensor is missing or has another shape, a tied model's file has another output layer, or there
            are layers behind the last.
    """
    expected = logical_tensors(architecture)
    if isinstance(architecture, ModuleArchitecture):
        add_prefix(source, architecture)
    source.shapes()  # refuses a tensor that two files hold
    missing = sorted(expected.keys() - source.files.keys())
    if missing:
        raise ConfigError(
            f"{source.folder} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}: "
            "the download is incomplete, or config.json belongs to another model"
        )
    for name, shape in expected.items():
        source.check(name, shape)
    embedding, output = _vocabulary_names(architecture)
    if output not in expected and not architecture.value_model and output in source:
        check_tied(source, embedding, output, expected[embedding])
    # Two kinds of extra tensors are harmless: the stored output layer of a tied model, and buffers that are recomputed.
    extra = [n for n in source.names() if n not in expected and n != output and "rotary_emb" not in n]
    behind = _left_out(source, extra, architecture, drop_mtp)
    extra = [n for n in extra if n not in behind]
    if extra:
        logger.warning("%s: %d tensors are not used, first %s", source.folder, len(extra), sorted(extra)[0])


def add_prefix(source: SafetensorsFolder, architecture: ModuleArchitecture) -> None:
    """Files of a bare decoder, as of the first GPT-2, lack the name that the decoder has in the language model."""
    prefix = f"{architecture.module_class.base_model_prefix}."
    missing = [name for name in logical_tensors(architecture) if name not in source and name.startswith(prefix)]
    names = {name.removeprefix(prefix): name for name in missing}
    source.rename({stored: name for stored, name in names.items() if stored in source})


def _left_out(source: SafetensorsFolder, extra: list[str], architecture: Architecture, drop_mtp: bool) -> list[str]:
    """The tensors of layers of multi-token prediction. Raises ConfigError where they, or layers of another kind, may
    not be left out."""
    layers = layers_behind(extra, architecture)
    for prefix, names in layers.items():
        if not predicts_tokens(names):
            raise ConfigError(
                f"{source.files[names[0]]}: {names[0]} {list(source.shape(names[0]))} is of a layer behind the last, "
                f"since config.json has num_hidden_layers={architecture.num_layers}: {prefix}* would be cut off; "
                "config.json and the weights do not belong together"
            )
        if not drop_mtp:
            raise ConfigError(
                f"{source.folder}: {prefix}* ({len(names)} tensors) predicts several tokens (MTP), which no layout "
                "here holds: --drop-mtp converts the model without it, with num_nextn_predict_layers=0"
            )
        logger.warning(
            "%s: %s*, %d tensors, predicts several tokens: it is neither trained nor exported",
            *(source.folder, prefix, len(names)),
        )
    return [name for names in layers.values() for name in names]


def _vocabulary_names(architecture: Architecture) -> tuple[str, str]:
    """Of the embedding, and of the output layer where the two are not tied; "" of a module without a family."""
    if isinstance(architecture, ModuleArchitecture):
        return "", ""
    model = describe(replace(architecture, tied=False, value_model=False))
    return model.embedding.hf, model.output.hf


def check_tied(source: SafetensorsFolder, embedding: str, output: str, shape: tuple[int, ...]) -> None:
    """Raise ConfigError where a stored output layer is not the embedding that takes its place, compared in parts."""
    source.check(output, shape)
    for start, stop in row_blocks(0, shape[0], shape[1] * source.dtype(output).itemsize):
        first, second = (source.read(Span(n, start, stop, 0, shape[1], 0, 0)) for n in (output, embedding))
        if not torch.equal(first.float(), second.float()):
            raise ConfigError(
                f"{source.files[output]}: {output} is not {embedding}, but config.json says tie_word_embeddings=true, "
                "so it would be ignored: set tie_word_embeddings to false to use it, or remove it from the file"
            )


def refuse_own_code(model: PreTrainedModel) -> None:
    """Raise ConfigError for a model whose computation or parameters are not those of the class in `transformers`."""
    for name, module in model.named_modules():
        kind = type(module)
        definer = next(base for base in kind.__mro__ if "forward" in vars(base))
        if "forward" in vars(module) or definer.__module__.partition(".")[0] not in ("transformers", "torch"):
            raise NoFamilyError(
                f"{name or 'the model'} is a {kind.__name__} with a forward of its own, which would be trained and "
                "exported as the stock model: give the stock class, add its family in megatron_rl/models, or train it "
                "as it is with backend=fsdp2"
            )


def model_source(model: PreTrainedModel) -> tuple[Architecture, TensorSource]:
    """The architecture of a Hugging Face model in memory, and its weights as a source for `fill`.

    Raises:
        ConfigError: its family is not supported, or it is a classifier of several labels.
    """
    refuse_own_code(model)
    architecture = architecture_from_hf(model.config)
    if SCORE in model.state_dict():
        require_one_label(model.config, type(model).__name__)
        architecture = replace(architecture, value_model=True)
    state = dict(model.state_dict())
    known = {
        s.name for layout in (transformers_layout(architecture), hf_layout(architecture)) for s in layout.shards(0)
    }
    embedding, output = _vocabulary_names(architecture)
    extra = sorted(name for name in state if name not in known and name != output and "rotary_emb" not in name)
    if extra:
        raise NoFamilyError(
            f"{type(model).__name__} has {len(extra)} tensors that a {architecture.family} model does not have, first "
            f"{extra[0]!r}: they would be neither trained nor exported. Give the stock model, or train it as it is "
            "with backend=fsdp2"
        )
    tied = output not in known and SCORE not in known
    if tied and output in state and not torch.equal(state[output], state[embedding]):
        raise ConfigError(
            f"{type(model).__name__}: {output} is not {embedding}, but its config says tie_word_embeddings=true: tie "
            "them, or set config.tie_word_embeddings=False"
        )
    return architecture, state_source(architecture, state)


def state_source(architecture: Architecture, state: Mapping[str, Tensor]) -> TensorSource:
    """A Hugging Face state dict as a source: in the form of files, or of `transformers` in memory (stacked experts)."""
    layout = transformers_layout(architecture)
    if any(shard.name not in state for shard in layout.shards(0)):
        layout = hf_layout(architecture)
    return in_memory(state, layout)
