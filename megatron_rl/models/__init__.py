"""Models as data: descriptions, families, layouts, and how Hugging Face and Megatron spell both.

Importing this loads no framework; what needs Megatron-Core or transformers is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_rl.models import families  # noqa: F401  (registers them)
from megatron_rl.models.architecture import Architecture, Experts
from megatron_rl.models.family import FAMILIES, ModelFamily, describe, family_of
from megatron_rl.models.layouts import (
    hf_layout,
    logical_tensors,
    megatron_layout,
    rollout_layout,
    transformers_layout,
)
from megatron_rl.models.naming import MegatronNaming

if TYPE_CHECKING:
    from megatron_rl.models.hf_config import architecture_from_hf, hf_config_from
    from megatron_rl.models.megatron_architecture import architecture_from_megatron

_LAZY = {
    "architecture_from_hf": "hf_config",
    "architecture_from_megatron": "megatron_architecture",
    "hf_config_from": "hf_config",
}

__all__ = [
    "FAMILIES",
    "Architecture",
    "Experts",
    "MegatronNaming",
    "ModelFamily",
    "architecture_from_hf",
    "architecture_from_megatron",
    "describe",
    "family_of",
    "hf_config_from",
    "hf_layout",
    "logical_tensors",
    "megatron_layout",
    "rollout_layout",
    "transformers_layout",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
