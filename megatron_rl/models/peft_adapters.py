"""`PeftAdapters`: the adapters of a PEFT folder by the logical tensors of the model that they belong to.

Experts may be stacked, as PEFT writes them with `transformers` 5 (see `peft_names`), or numbered, each with linear
layers of its own, as it did before. Everything is checked when the folder is opened, from the names and shapes of its
tensors; matrices are read when they are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.layouts import logical_tensors
from megatron_rl.models.peft_config import ALL_LINEAR, WEIGHTS_FILE, PeftConfig
from megatron_rl.models.peft_names import FIRST, PREFIX, SECOND, ModulePlace, experts_first, module_places

ENDINGS = {".lora_A.weight": "A", ".lora_B.weight": "B"}


class Update(NamedTuple):
    """``factor * b @ a`` of one logical tensor, or of one expert of a transposed one."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]


@dataclass(frozen=True, slots=True)
class Entry:
    """One pair of matrices in the file: of a linear layer, or of stacked experts."""

    module: str  # what precedes ".lora_A.weight", without PEFT's prefix
    chosen_by: str  # the name that the config's patterns are matched with
    inputs: int
    outputs: int
    rank: int
    factor: float
    num_experts: int = 0  # 0: no stacked experts


class PeftAdapters:
    """The adapters of ``folder`` for a model of ``architecture``.

    Raises:
        ConfigError: a file is missing or unreadable, the config has what is not supported, a tensor belongs to no
            matrix of the model or has another shape than it should, or one that the config chooses is missing.
    """

    def __init__(self, folder: str | Path, architecture: Architecture) -> None:
        self.config = PeftConfig.read(Path(folder).expanduser())
        self.path = self.config.path.with_name(WEIGHTS_FILE)
        self.places, self._logical = module_places(architecture), logical_tensors(architecture)
        self._matrices = functools.lru_cache(2)(self._read_matrices)  # neighbouring tensors share an entry
        self._shapes = self._read_shapes()
        self._entries = self._find()
        self._check_all_used()
        self._check_none_missing()

    def entry(self, tensor: str) -> Entry | None:
        """Of a logical tensor."""
        return self._entries.get(tensor)

    @property
    def tensors(self) -> list[str]:
        """The logical tensors that have an adapter."""
        return list(self._entries)

    def read(self, tensor: str, expert: int | None = None) -> Update:
        """The matrices of a logical tensor.

        Args:
            expert: of a tensor that holds those of several experts.
        """
        entry, place = self._entries[tensor], self.places[tensor]
        a, b = self._matrices(entry)
        if not entry.num_experts:
            return Update(a, b)
        number = place.row // place.outputs if expert is None else expert
        own = slice(number * entry.rank, (number + 1) * entry.rank)
        start = number * place.outputs if expert is not None else place.row
        rows = place.outputs if expert is not None else self._logical[tensor][0]
        return Update(a[own], b[start : start + rows])

    def _read_matrices(self, entry: Entry) -> tuple[Tensor, Tensor]:
        with safe_open(self.path, framework="pt", device="cpu") as file:
            a, b = (file.get_tensor(f"{PREFIX}{entry.module}{ending}") for ending in ENDINGS)
        return a, experts_first(b, entry.num_experts) if entry.num_experts else b

    def _read_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Module -> shapes of its A and B."""
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.path} cannot be read: {error}") from error
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
            if ending is None or not name.startswith(PREFIX):
                raise ConfigError(
                    f"{self.path}: tensor {name} {list(shape)} is no A or B of a linear layer; expected "
                    f"{PREFIX}MODULE.lora_A.weight or .lora_B.weight"
                )
            found.setdefault(name[len(PREFIX) : -len(ending)], {})[ENDINGS[ending]] = shape
        for module, pair in found.items():
            if len(pair) < 2:
                (have, shape), (lack,) = *pair.items(), set("AB") - set(pair)
                raise ConfigError(f"{self.path}: {PREFIX}{module} has lora_{have} {list(shape)}, but no lora_{lack}")
        return found

    def _find(self) -> dict[str, Entry]:
        found = {}
        for tensor, place in self.places.items():
            for candidate in self._candidates(tensor, place):
                if candidate.module in self._shapes:
                    self._check_shapes(candidate)
                    found[tensor] = candidate
                    break
        return found

    def _candidates(self, tensor: str, place: ModulePlace) -> Iterator[Entry]:
        config, experts = self.config, place.num_experts if len(place.shape) == 3 else 0
        if experts:
            module, _, name = place.parameter.rpartition(".")
            others = [f"{module}.{other}" for other in (FIRST, SECOND) if other != name]
            nested = name == FIRST and any(map(config.chooses_parameter, others))
            if config.chooses_parameter(place.parameter):
                yield self._entry(f"{module}.base_layer" if nested else module, place.parameter, place, experts)
        if not place.transposed and tensor in self._logical and len(self._logical[tensor]) == 2:
            outputs, inputs = self._logical[tensor]
            own = ModulePlace(tensor, (outputs, inputs), 0)
            for parameter in dict.fromkeys((place.parameter, tensor) if not experts else (tensor,)):
                module, by_itself = parameter.removesuffix(".weight"), config.chooses_parameter(parameter)
                if by_itself or config.chooses(module) or config.target_modules == ALL_LINEAR:
                    yield self._entry(module, parameter if by_itself else module, own, 0)

    def _entry(self, module: str, chosen_by: str, place: ModulePlace, experts: int) -> Entry:
        rank, factor = self.config.rank_of(chosen_by), self.config.factor_of(chosen_by)
        return Entry(module, chosen_by, place.inputs, place.outputs, rank, factor, experts)

    def _check_shapes(self, entry: Entry) -> None:
        stacked, given = max(1, entry.num_experts), self._shapes[entry.module]
        expected = {"A": (entry.rank * stacked, entry.inputs), "B": (entry.outputs, entry.rank * stacked)}
        for matrix, shape in expected.items():
            if given[matrix] != shape:
                raise ConfigError(
                    f"{self.path}: {PREFIX}{entry.module}.lora_{matrix}.weight has shape {list(given[matrix])}, but "
                    f"the base and rank {entry.rank} of {self.config.path.name} ask for {list(shape)}: the adapter "
                    "belongs to another base, or to another config"
                )

    def _check_all_used(self) -> None:
        used = {entry.module for entry in self._entries.values()}
        unknown = {module: pair["B"] for module, pair in self._shapes.items() if module not in used}
        if unknown:
            some = ", ".join(f"{module} (B {list(shape)})" for module, shape in list(unknown.items())[:3])
            raise ConfigError(
                f"{self.path} has adapters of {len(unknown)} modules that the model has not, or that "
                f"{self.config.path.name} does not choose: {some}: the adapter belongs to another base"
            )

    def _check_none_missing(self) -> None:
        numbered = any(self.places[t].num_experts > 1 and not e.num_experts for t, e in self._entries.items())
        missing = [
            chosen
            for tensor, place in self.places.items()
            if tensor not in self._entries
            for chosen in (_chosen(self.config, tensor, place, numbered),)
            if chosen
        ]
        if missing or not self._entries:
            some = ", ".join(dict.fromkeys(missing)) or "anything"
            raise ConfigError(
                f"{self.path} lacks adapters of {some[:300]}, which {self.config.path.name} chooses: the file is not "
                "complete, or belongs to another config"
            )


def _chosen(config: PeftConfig, tensor: str, place: ModulePlace, numbered: bool) -> str | None:
    """The name by which a config chooses a matrix, if it does."""
    if config.chooses_parameter(place.parameter):
        return place.parameter
    is_expert = len(place.shape) == 3
    module = (tensor if is_expert else place.parameter).removesuffix(".weight")
    return module if config.chooses(module) and (numbered or not is_expert) else None
