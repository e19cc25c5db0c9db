"""Adapters alone as a PEFT folder, which PEFT, vLLM and SGLang load beside the model that they were trained on.

A layer that Megatron fuses has one A for all its parts: each part gets a copy of it, and its own rows of B. That is the
same update, exactly. Adapters are small, so the ranks' parts are brought together as they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.models.safetensors_files import write_safetensors
from megatron_rl.reshard.layout import Shard

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's names of what it wraps


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """What one rank holds of A or B of one Hugging Face weight."""

    name: str  # in the file
    offset: tuple[int, int]  # of its first row and column in the whole matrix
    values: Tensor


def parts_of(shard: Shard, a: Tensor, b: Tensor, row_parallel: bool) -> list[AdapterPart]:
    """The parts that a rank's adapter of the weight ``shard`` holds of its logical tensors' A and B.

    Args:
        a, b: this rank's, ``[rank, in]`` and ``[out, rank]``: of a row-parallel layer A is a part, of others B.
    """
    found = []
    for span in shard.spans:
        name = PREFIX + span.tensor.removesuffix("weight")
        rows = b[span.row : span.row + span.num_rows].detach().cpu()
        start = (0, span.col_start) if row_parallel else (0, 0)
        found.append(AdapterPart(name + "lora_A.weight", start, a.detach().cpu()))
        found.append(AdapterPart(name + "lora_B.weight", (span.row_start, 0), rows))
    return found


def assembled(parts: Iterable[AdapterPart]) -> dict[str, Tensor]:
    """Whole matrices from the parts of all ranks; parts that several ranks hold may come several times."""
    by_name: dict[str, list[AdapterPart]] = {}
    for part in parts:
        by_name.setdefault(part.name, []).append(part)
    whole = {}
    for name, members in sorted(by_name.items()):
        rows, cols = (max(part.offset[dim] + part.values.shape[dim] for part in members) for dim in (0, 1))
        whole[name] = torch.zeros(rows, cols, dtype=members[0].values.dtype)
        filled = torch.zeros(rows, cols, dtype=torch.bool)
        for part in members:
            (row, col), (height, width) = part.offset, part.values.shape
            whole[name][row : row + height, col : col + width] = part.values
            filled[row : row + height, col : col + width] = True
        assert filled.all(), f"{name} has holes"
    return whole


def write_peft(
    folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, float], base: str, overwrite: bool
) -> None:
    """Write the folder; it appears complete or not at all.

    Args:
        tensors: from `assembled`.
        facts: r, lora_alpha and lora_dropout.
        base: name or folder of the model that the adapters belong to, for whoever loads them.

    Raises:
        ConfigError: the folder exists and may not be replaced.
    """
    if folder.exists() and not overwrite:
        raise ConfigError(f"{folder} exists: give another folder, or overwrite=True to replace it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_safetensors(partial / WEIGHTS_FILE, tensors)
    modules = sorted({name.split(".")[-3] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **facts,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
