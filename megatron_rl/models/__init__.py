"""Model families as data, and the Megatron-Core models built from them.

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
    from megatron_rl.models.local_tensors import chunk_tensors, naming_of
    from megatron_rl.models.megatron_architecture import architecture_from_megatron

_LAZY = {
    "architecture_from_hf": "hf_config",
    "architecture_from_megatron": "megatron_architecture",
    "chunk_tensors": "local_tensors",
    "hf_config_from": "hf_config",
    "naming_of": "local_tensors",
}

__all__ = [
    "FAMILIES",
    "Architecture",
    "Experts",
    "MegatronNaming",
    "ModelFamily",
    "architecture_from_hf",
    "architecture_from_megatron",
    "chunk_tensors",
    "describe",
    "family_of",
    "hf_config_from",
    "hf_layout",
    "logical_tensors",
    "megatron_layout",
    "naming_of",
    "rollout_layout",
    "transformers_layout",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
