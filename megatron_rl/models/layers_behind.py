"""Layers in files behind a model's last one: those that predict several tokens (MTP), which no decoder here computes.

One rule: training leaves them out and says so; a conversion, and its proof, refuses them by name unless it is told to
leave them out (``--drop-mtp``).
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import describe
from megatron_rl.models.module_architecture import ModuleArchitecture

PROJECTION = ".eh_proj.weight"  # of two hidden states into one, which every such layer of DeepSeek's and GLM's has


def layers_behind(names: Iterable[str], architecture: Architecture) -> dict[str, list[str]]:
    """Prefix of each layer beyond those of the decoder -> its tensors; none for a module without a family, of which
    nobody knows."""
    if isinstance(architecture, ModuleArchitecture):
        return {}
    found: dict[str, list[str]] = {}
    layers = describe(architecture).layers_prefix
    for name in sorted(names):
        _, prefix, rest = name.partition(layers)
        number = rest.partition(".")[0]
        if prefix and number.isdigit() and int(number) >= architecture.num_layers:
            found.setdefault(f"{prefix}{number}.", []).append(name)
    return found


def predicts_tokens(names: Iterable[str]) -> bool:
    """Whether a layer's tensors are those of multi-token prediction."""
    return any(name.endswith(PROJECTION) for name in names)
