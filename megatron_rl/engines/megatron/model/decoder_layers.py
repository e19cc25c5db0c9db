"""The decoder layers of a model chunk, whichever class of Megatron-Core's holds them.

`GPTModel` has one module a layer. `HybridModel`, which takes its place from megatron-core 0.19 on, has a module for
each letter of a pattern, numbered one by one: layer i of a decoder is its modules 2i ("*", attention) and 2i + 1 ("-"
or "E", feed-forward). Here layers are counted as Hugging Face counts them, and parameters named as in a `GPTModel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

HYBRID_MODEL = "megatron.core.models.hybrid.hybrid_model.HybridModel"  # absent before 0.18: known by its name
ATTENTION, FEED_FORWARD = "*", "-E"  # letters of megatron.core's hybrid_layer_allocation.Symbols
KINDS = {"M": "Mamba", "G": "gated delta net", "+": "latent attention", "D": "sparse latent attention"}
_MODULE = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer; both modules are the same in a `GPTModel`."""

    index: int  # in the whole model, from 0
    attention: Any  # the module with `self_attention`, which gets the layer's input
    feed_forward: Any  # the module with `mlp`, which returns the layer's output


def is_hybrid(model: nn.Module) -> bool:
    """Whether a bare chunk is a `HybridModel`, or of a class derived from it."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == HYBRID_MODEL for cls in type(model).__mro__)


def decoder_layers(model: Any) -> list[DecoderLayer]:
    """The layers of a bare chunk, in local order."""
    modules = list(model.decoder.layers)
    if not is_hybrid(model):
        return [DecoderLayer(module.layer_number - 1, module, module) for module in modules]
    pairs = zip(modules[::2], modules[1::2], strict=True)
    return [DecoderLayer((first.layer_number - 1) // 2, first, second) for first, second in pairs]


def unpaired(pattern: str) -> str:
    """What a pattern of layers has beside pairs of attention and feed-forward; empty where it is a decoder's."""
    others = [f"{letter!r} ({KINDS[letter]})" for letter in dict.fromkeys(pattern) if letter in KINDS]
    pairs = re.fullmatch(f"(\\{ATTENTION}[{FEED_FORWARD}])*", pattern)
    return ", ".join(others) or ("" if pairs else "attention and feed-forward layers that do not alternate")


def num_decoder_layers(pattern: str) -> int:
    """Layers of the whole model that ``pattern`` describes, ``|`` between pipeline stages and MTP included."""
    return len(main_pattern(pattern)) // 2


def main_pattern(pattern: str) -> str:
    """The letters of the decoder's own modules."""
    return pattern.split("/")[0].replace("|", "")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a bare chunk with the names that they have in a `GPTModel`."""
    for name, parameter in model.named_parameters():
        yield gpt_name(model, name), parameter


def gpt_name(model: nn.Module, name: str) -> str:
    """What a parameter or buffer of a bare chunk is called in a `GPTModel`."""
    if not is_hybrid(model):
        return name
    if name.startswith("decoder.final_norm."):
        return name.replace("final_norm", "final_layernorm", 1)
    return _MODULE.sub(lambda found: f"decoder.layers.{int(found[1]) // 2}.", name)
