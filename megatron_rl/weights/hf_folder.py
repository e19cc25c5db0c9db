"""`HFFolderWriter`: writes a Hugging Face folder file by file; it appears complete or not at all.

The tensors are divided into files of bounded size before anything is written, so that each file can be filled and
written by itself, by any rank. Everything goes into a hidden folder beside the target, which takes the target's name
when all is on disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import family_of
from megatron_rl.models.hf_config import architecture_from_hf, hf_config_from, module_config
from megatron_rl.models.layouts import logical_tensors
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.models.safetensors_files import SafetensorsWriter, write_safetensors
from megatron_rl.models.tokenizer import copy_tokenizer
from megatron_rl.parallel.agreement import Agreement
from megatron_rl.reshard import WireFormat
from megatron_rl.reshard.layout import Span, matrix_shape
from megatron_rl.weights.file_copies import row_blocks
from megatron_rl.weights.source import INDEX_FILE, SINGLE_FILE, TensorSource

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 2 << 30
DESCRIPTION_FOLDER = "hf"  # inside of a Megatron checkpoint


@dataclass(frozen=True, slots=True)
class HFFile:
    """One safetensors file of a folder."""

    name: str
    tensors: dict[str, tuple[int, ...]]
    num_bytes: int


def plan_files(tensors: Mapping[str, tuple[int, ...]], dtypes: WireFormat, max_bytes: int) -> tuple[HFFile, ...]:
    """Divide ``tensors``, in order, into files of at most ``max_bytes``; a larger tensor gets a file of its own."""
    groups: list[dict[str, tuple[int, ...]]] = []
    sizes: list[int] = []
    for name, shape in tensors.items():
        size = math.prod(shape) * dtypes.of(name).itemsize
        if not groups or sizes[-1] + size > max_bytes:
            groups.append({})
            sizes.append(0)
        groups[-1][name] = shape
        sizes[-1] += size
    if len(groups) == 1:
        return (HFFile(SINGLE_FILE, groups[0], sizes[0]),)
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return tuple(HFFile(*parts) for parts in zip(names, groups, sizes, strict=True))


@dataclass(frozen=True)
class HFDescription:
    """What a Hugging Face folder holds beside tensors."""

    architecture: Architecture
    config: PretrainedConfig | Mapping[str, Any] | None = None  # of the model it came from; None makes a fresh one
    tokenizer: PreTrainedTokenizerBase | None = None
    generation: GenerationConfig | None = None
    tokenizer_folder: Path | None = None  # whose tokenizer's files are taken as they are

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config.json, generation_config.json and the tokenizer's files."""
        config = self._config(dtype)
        config.save_pretrained(folder)
        if not isinstance(self.architecture, ModuleArchitecture):
            _add_older_spellings(folder / "config.json")
        if not self.architecture.value_model:
            generation = self.generation or GenerationConfig.from_model_config(config)
            generation.save_pretrained(folder)
        if self.tokenizer_folder is not None:
            copy_tokenizer(self.tokenizer_folder, folder)
        elif self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def write_into(self, checkpoint: Path, dtype: torch.dtype) -> None:
        """Make a Megatron checkpoint say what model it holds; `engines.conversion` reads it."""
        folder = checkpoint / DESCRIPTION_FOLDER
        folder.mkdir()
        self.write(folder, dtype)

    def _config(self, dtype: torch.dtype) -> PretrainedConfig:
        a, name = self.architecture, str(dtype).removeprefix("torch.")
        if isinstance(a, ModuleArchitecture):
            return module_config(a, self.config, self.tokenizer, name)
        if not self.config:
            config = hf_config_from(a, self.tokenizer, name)
            if a.value_model:
                config.num_labels = 1
            return config
        fields = self.config.to_dict() if isinstance(self.config, PretrainedConfig) else dict(self.config)
        fields.pop("auto_map", None)  # to code that is not exported
        config = CONFIG_MAPPING[a.family].from_dict(fields | {"model_type": a.family})
        config.architectures, config.dtype = [family_of(a.family).hf_name(a)], name
        config.update(dict(family_of(a.family).exported))
        if a.value_model:
            config.num_labels = 1
            if self.tokenizer is not None:
                config.pad_token_id = self.tokenizer.pad_token_id
        found = replace(architecture_from_hf(config), value_model=a.value_model)
        if found != a:
            raise ConfigError(f"hf_config describes {found}, but the weights are of {a}: pass the model's own config")
        return config


def _add_older_spellings(path: Path) -> None:
    """transformers 5 renamed keys; engines built on transformers 4 would silently use defaults for them."""
    fields = json.loads(path.read_text())
    rope = dict(fields["rope_parameters"])
    if "sliding_attention" in rope:  # Gemma 3
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    fields["rope_theta"] = rope.pop("rope_theta")
    if (part := rope.pop("partial_rotary_factor", None)) is not None:
        fields["partial_rotary_factor"] = part
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = rope
    if "num_local_experts" in fields:
        fields["num_experts"] = fields["num_local_experts"]
    fields["torch_dtype"] = fields["dtype"]
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


class HFFolderWriter:
    """Writes one folder: ``begin``, ``write`` each of ``files`` (on any rank that sees the file system), ``commit``.

    Args:
        folder: the result; its parent must exist or be creatable.
        dtype: of all tensors, or of each of them.
        max_shard_bytes: largest file, and with it the largest buffer a writer needs.
        overwrite: replace a folder that exists and is not empty.
    """

    def __init__(
        self,
        folder: str | Path,
        description: HFDescription,
        dtype: torch.dtype | WireFormat,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        self.description, self.overwrite = description, overwrite
        self.dtypes = dtype if isinstance(dtype, WireFormat) else WireFormat(dtype)
        self.tensors = logical_tensors(description.architecture)
        self.files = plan_files(self.tensors, self.dtypes, max_shard_bytes)

    def begin(self) -> None:
        """Make the hidden folder, removing what an earlier, broken attempt left. One rank calls this.

        Raises:
            ConfigError: the target exists and may not be replaced.
        """
        if self.folder.exists() and not self.overwrite and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(f"{self.folder} exists and is not empty: choose another folder, or allow overwriting")
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)

    def write(self, file: HFFile, tensors: Mapping[str, Tensor]) -> None:
        """Write one file; ``tensors`` are exactly those it names, on any device."""
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == file.tensors
        path = self.partial / file.name
        try:
            write_safetensors(path, tensors, durable=True)
        except OSError as error:
            raise OSError(f"{path} could not be written: {error}") from error

    def stream(self, file: HFFile, source: TensorSource) -> None:
        """Write one file straight from ``source``, some rows at a time."""
        path = self.partial / file.name
        shapes = {name: (shape, self.dtypes.of(name)) for name, shape in file.tensors.items()}
        try:
            with SafetensorsWriter(path, shapes) as written:
                for name in written.names:
                    (rows, cols), dtype = matrix_shape(file.tensors[name]), shapes[name][1]
                    for start, stop in row_blocks(0, rows, cols * dtype.itemsize):
                        values = source.read(Span(name, start, stop, 0, cols, 0, 0))
                        written.write(values.to(dtype).contiguous())
        except OSError as error:
            raise OSError(f"{path} could not be written: {error}") from error

    def commit(self) -> None:
        """Write what belongs beside the tensors and give the folder its name. One rank calls this, after all writes."""
        self.description.write(self.partial, self.dtypes.dtype)
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": sum(file.num_bytes for file in self.files)},
                "weight_map": {name: file.name for file in self.files for name in file.tensors},
            }
            (self.partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        missing = [file.name for file in self.files if not (self.partial / file.name).is_file()]
        if missing:
            raise RuntimeError(
                f"{self.partial} lacks {missing[0]}, which another rank wrote: all ranks must see one file system"
            )
        self.publish()

    def publish(self) -> None:
        """Give the hidden folder its name, in the place of what had it."""
        old = self.folder.with_name(f".{self.folder.name}.replaced")
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
        self.partial.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        logger.info("wrote %s", self.folder)

    def abandon(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, together: Agreement, leads: bool) -> Iterator[None]:
        """Begin the hidden folder on the rank that ``leads``, and remove it if the body fails. Collective."""
        with together.attempt():
            if leads:
                self.begin()
        try:
            yield
        except BaseException:
            if leads:
                self.abandon()
            raise

    def shares(self, ranks: tuple[int, ...]) -> Iterator[dict[int, HFFile]]:
        """Waves of files, at most one for each rank at a time."""
        for start in range(0, len(self.files), len(ranks)):
            yield dict(zip(ranks, self.files[start : start + len(ranks)], strict=False))
