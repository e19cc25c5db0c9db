"""What a job's own `HybridModel` computes, in the terms of a `GPTModel`: its pattern, configuration and rotary base.

megatron-core's models/hybrid/hybrid_model.py keeps neither ``rotary_base`` nor ``rotary_percent``; both follow from the
frequencies that it made of them. ``num_layers`` of its configuration counts modules, and the pattern, not
``moe_layer_freq``, says which have experts.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from megatron_rl.engines.megatron.model.decoder_layers import is_hybrid, main_pattern, num_decoder_layers, unpaired
from megatron_rl.models.megatron_fields import Refusal, shown

# argument of `HybridModel` alone -> what becomes of it; the others are as in `GPTModel`
HYBRID_ARGUMENTS: dict[str, str] = {
    "hybrid_stack_spec": "checked by the classes of the modules and by the names of the parameters",
    "hybrid_layer_pattern": "taken over: a pair of `*` (attention) and `-` or `E` (feed-forward, experts) is a layer; "
    "Mamba (`M`), latent attention (`+`) and the other kinds, MTP, and stages that part a pair are refused",
    "hybrid_attention_ratio": "refused through the pattern that it makes",
    "hybrid_mlp_ratio": "refused through the pattern that it makes",
    "hybrid_override_pattern": "as hybrid_layer_pattern",
}


def refused_pattern(chunk: nn.Module) -> list[Refusal]:
    """The layers of a bare chunk that no decoder has; empty for a `GPTModel`."""
    if not is_hybrid(chunk):
        return []
    model: Any = chunk
    pattern, here = str(model.hybrid_layer_pattern), "".join(model.decoder.layer_type_list)
    whole = unpaired(main_pattern(pattern)) or ("multi-token prediction" if "/" in pattern else "")
    expected = "pairs of attention (*) and feed-forward (- or E) layers, such as *-*- or *-*E"
    found = [Refusal("hybrid_layer_pattern", f"{pattern!r} with {whole}", expected)] if whole else []
    if not whole and unpaired(here):
        given = f"{pattern!r}, of which a pipeline stage gets {here!r}"
        found.append(Refusal("hybrid_layer_pattern", given, "stages that begin with attention and end behind an MLP"))
    if not model.decoder.post_layer_norm and model.post_process:
        found.append(Refusal("post_layer_norm", "False", "True"))
    if chunk.config.window_size is not None and chunk.config.window_attn_skip_freq is not None:  # type: ignore[union-attr]
        given = shown(chunk.config.window_attn_skip_freq)  # type: ignore[union-attr]
        found.append(Refusal("window_attn_skip_freq", given, "None: it would count modules of the pattern"))
    return found


def decoder_config(chunk: nn.Module) -> Any:
    """The configuration of a bare chunk with layers counted as a `GPTModel` counts them."""
    if not is_hybrid(chunk):
        return chunk.config
    model: Any = chunk
    kinds = main_pattern(str(model.hybrid_layer_pattern))[1::2]
    config = copy.copy(model.config)
    config.num_layers = num_decoder_layers(str(model.hybrid_layer_pattern))
    config.moe_layer_freq = [int(kind == "E") for kind in kinds]
    if "E" not in kinds:
        config.num_moe_experts = None
    return config


def rotary_of(chunk: nn.Module) -> tuple[float, float]:
    """``rotary_base`` and ``rotary_percent`` of a bare chunk."""
    model: Any = chunk
    if not is_hybrid(chunk):
        return float(model.rotary_base), float(model.rotary_percent)
    frequencies = getattr(model._modules.get("rotary_pos_emb"), "inv_freq", None)
    if frequencies is None or len(frequencies) < 2:  # latent attention has its own; one pair turns at 1 by any base
        return 10000.0, 1.0
    pairs = len(frequencies)
    base = float(frequencies[-1].double()) ** (-pairs / (pairs - 1))  # the slowest turns at base^(-(pairs-1)/pairs)
    return float(f"{base:.6g}"), 2 * pairs / model.config.kv_channels
