"""A PEFT folder's `adapter_config.json`: which layers have adapters, of which rank and scale.

Read as PEFT 0.21 reads it (`tuners_utils.check_target_module_exists`, `utils.other.get_pattern_key`). What would change
the numbers in another way than ``W + factor * B A`` is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.models.hf_config import read_json_object

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"  # PEFT's short form of target_modules

# Fields that ask for more than plain LoRA on linear layers; each must be absent, empty or false.
REFUSED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)


@dataclass(frozen=True)
class PeftConfig:
    """The fields that say where adapters are, and how large."""

    path: Path  # of the file
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    target_parameters: tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers: tuple[int, ...] | None  # None = all
    layers_pattern: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """The config of ``folder``.

        Raises:
            ConfigError: there is none, it is no LoRA, or it has what is not supported.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(f"lora.path={folder} has no {CONFIG_FILE}: expected a folder that PEFT wrote")
        fields = read_json_object(path)
        _refuse(path, fields)
        layers = fields.get("layers_to_transform")
        return cls(
            path=path,
            rank=int(fields.get("r", 8)),
            alpha=float(fields.get("lora_alpha", 8)),
            dropout=float(fields.get("lora_dropout", 0.0)),
            rslora=bool(fields.get("use_rslora")),
            rank_pattern=dict(fields.get("rank_pattern") or {}),
            alpha_pattern=dict(fields.get("alpha_pattern") or {}),
            target_modules=_names(fields.get("target_modules")),
            target_parameters=tuple(fields.get("target_parameters") or ()),
            exclude_modules=_names(fields.get("exclude_modules")),
            layers=(layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
            layers_pattern=tuple(_listed(fields.get("layers_pattern"))),
        )

    def rank_of(self, module: str) -> int:
        """Of the adapter of a module, or of a parameter that is chosen by its own name."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def factor_of(self, module: str) -> float:
        """What B A is multiplied with: alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA (arXiv:2312.03732)."""
        rank, alpha = self.rank_of(module), float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def chooses(self, module: str) -> bool:
        """Whether a module of this name has an adapter; False where ``target_modules`` is all linear layers."""
        if _matches(self.exclude_modules, module) or self.target_modules == ALL_LINEAR:
            return False
        if not _matches(self.target_modules, module):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules or self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found.group(1)) in self.layers

    def chooses_parameter(self, parameter: str) -> bool:
        """The same of a parameter that is chosen by its own name."""
        return any(parameter == name or parameter.endswith(f".{name}") for name in self.target_parameters)


def _refuse(path: Path, fields: Mapping[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type is {kind!r}, expected 'LORA': other adapters cannot be trained here")
    given = [f"{name}={fields[name]!r}" for name in REFUSED if fields.get(name)]
    if fields.get("bias", "none") != "none":
        given.append(f"bias={fields['bias']!r}")
    if given:
        raise ConfigError(
            f"{path} has {', '.join(given)}: only plain LoRA on linear layers and experts can be trained here; merge "
            "the adapter into its base with PEFT (merge_and_unload) and train that model"
        )


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _matches(names: str | Iterable[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _names(given: Any) -> str | tuple[str, ...]:
    return given if isinstance(given, str) else tuple(_listed(given))


def _listed(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())
