"""Adapters alone as a PEFT folder, which is loaded beside the model that they were trained on.

A layer that Megatron fuses has one A for all its parts: each part gets a copy of it, and its own rows of B. That is the
same update, exactly. Adapters are small, so the rank that writes is sent the parts of all others as they are.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.models.peft_config import CONFIG_FILE, WEIGHTS_FILE
from megatron_rl.models.peft_names import ModulePlace, experts_last, matrix_names, target_of
from megatron_rl.models.safetensors_files import write_safetensors
from megatron_rl.reshard.layout import Shard


class Adapter(Protocol):
    """See `engines.base.LowRank`."""

    row_parallel: bool

    def matrices(self, tensor: str | None = None) -> tuple[Tensor, Tensor, float]:
        """A, B and factor on this rank."""


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """What one rank holds of A or B of one parameter of `transformers`."""

    parameter: str
    matrix: str  # "A" or "B"
    offset: tuple[int, int]  # of its first row and column in the whole matrix
    values: Tensor
    factor: float  # alpha / rank


class Whole(NamedTuple):
    """The adapter of one parameter."""

    place: ModulePlace
    a: Tensor  # [rank, in], of stacked experts [experts * rank, in]
    b: Tensor  # [out, rank], of stacked experts [experts * out, rank]
    factor: float

    @property
    def rank(self) -> int:
        return self.b.shape[1]


def parts_of(shard: Shard, adapter: Adapter, places: Mapping[str, ModulePlace]) -> list[AdapterPart]:
    """The parts that a rank's adapter of the weight ``shard`` holds.

    Args:
        places: from `module_places`.
    """
    found = []
    for span in shard.spans:
        place = places[span.tensor]
        a, b, factor = adapter.matrices(span.tensor if place.num_experts == 1 else None)
        if not len(a):  # a part without an adapter, of a layer that has one
            continue
        if place.transposed:  # of one expert, all of it
            expert, col = span.row_start // place.inputs, 0
            row, rows = expert * place.outputs, b
        else:
            row, rows = place.row + span.row_start, b[span.row : span.row + span.num_rows]
            expert, col = row // place.outputs, span.col_start if adapter.row_parallel else 0
        for matrix, offset, values in (("A", (expert * len(a), col), a), ("B", (row, 0), rows)):
            found.append(AdapterPart(place.parameter, matrix, offset, values.detach().cpu(), factor))
    return found


def assembled(parts: Iterable[AdapterPart], places: Mapping[str, ModulePlace]) -> dict[str, Whole]:
    """Whole matrices by parameter, from the parts of all ranks; what several ranks hold may come several times."""
    by_name: dict[str, dict[str, list[AdapterPart]]] = {}
    for part in parts:
        by_name.setdefault(part.parameter, {"A": [], "B": []})[part.matrix].append(part)
    of_parameter = {place.parameter: place for place in places.values()}
    return {
        name: Whole(
            of_parameter[name],
            _matrix(f"{name}: A", members["A"]),
            _matrix(f"{name}: B", members["B"]),
            members["A"][0].factor,
        )
        for name, members in sorted(by_name.items())
    }


def _matrix(name: str, parts: list[AdapterPart]) -> Tensor:
    rows, cols = (max(part.offset[dim] + part.values.shape[dim] for part in parts) for dim in (0, 1))
    whole = torch.zeros(rows, cols, dtype=parts[0].values.dtype)
    filled = torch.zeros(rows, cols, dtype=torch.bool)
    for part in parts:
        (row, col), (height, width) = part.offset, part.values.shape
        whole[row : row + height, col : col + width] = part.values
        filled[row : row + height, col : col + width] = True
    assert filled.all(), f"{name} has holes"
    return whole


def write_peft(
    folder: Path, adapters: Mapping[str, Whole], dropout: float, base: str, *, mixture: bool, overwrite: bool
) -> None:
    """Write the folder; it appears complete or not at all.

    Args:
        adapters: from `assembled`.
        dropout: what the adapters were trained with.
        base: name or folder of the model that the adapters belong to, for whoever loads them.
        mixture: that model has stacked experts.

    Raises:
        ConfigError: the folder exists and may not be replaced.
    """
    if folder.exists() and not overwrite:
        raise ConfigError(f"{folder} exists: give another folder, or overwrite=True to replace it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, whole in adapters.items():
        a_name, b_name = matrix_names(name, adapters)
        b = experts_last(whole.b, whole.place.num_experts) if len(whole.place.shape) == 3 else whole.b
        tensors |= {a_name: whole.a, b_name: b.contiguous()}
    write_safetensors(partial / WEIGHTS_FILE, tensors)
    (partial / CONFIG_FILE).write_text(json.dumps(_config(adapters, dropout, base, mixture), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _config(adapters: Mapping[str, Whole], dropout: float, base: str, mixture: bool) -> dict[str, Any]:
    """Fields of PEFT's ``LoraConfig``."""
    chosen = {name: target_of(name, whole.place, mixture) for name, whole in adapters.items()}
    parameters = sorted({target for target, is_parameter in chosen.values() if is_parameter})
    facts = {name: (one.rank, one.factor * one.rank) for name, one in adapters.items()}
    (rank, alpha), _ = Counter(facts.values()).most_common(1)[0]
    keys = {name: _key(name, is_parameter) for name, (_, is_parameter) in chosen.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else dropout,  # PEFT has none on parameters
        "target_modules": sorted({target for target, is_parameter in chosen.values() if not is_parameter}),
        "rank_pattern": {keys[name]: own for name, (own, _) in facts.items() if own != rank},
        "alpha_pattern": {keys[name]: own for name, (_, own) in facts.items() if own != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return config | ({"target_parameters": parameters} if parameters else {})


def _key(parameter: str, is_parameter: bool) -> str:
    """The pattern that PEFT finds one adapter's rank by."""
    return re.escape(parameter if is_parameter else parameter.removesuffix(".weight"))
