"""Gemma 2: four norms in a layer, soft caps of scores and logits, and windows in every other layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.components.norm import Norm
from megatron_rl.models.description import LayerDescription, ModelDescription
from megatron_rl.models.families.gemma import Gemma
from megatron_rl.models.family import FAMILIES
from megatron_rl.reshard.layout import Recomputed


@FAMILIES.register("gemma2")
class Gemma2(Gemma):
    """SGLang's norms hold the weight of the file, and beside it 1 + weight, which its loader computes."""

    sums_norms = False
    post_norms = bends = True
    windowed = names_windows = True
    activation_key = "hidden_activation"
    keeps_sums = True  # in SGLang, beside the weights of norms

    def layer(self, a: Architecture, index: int) -> LayerDescription:
        names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        norms = [self.norm(a, f"{name}_layernorm.weight") for name in names]
        return LayerDescription(
            attention_norm=norms[0],
            attention=self.attention(a, index),
            attention_post_norm=norms[1],
            mlp_norm=norms[2],
            mlp=self.mlp(a, index),
            mlp_post_norm=norms[3],
            recomputed=tuple(map(_sum_of, norms)) if self.keeps_sums else (),
        )

    def describe(self, a: Architecture) -> ModelDescription:
        model = super().describe(a)
        return replace(model, final_recomputed=(_sum_of(model.final_norm),)) if self.keeps_sums else model

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        # SGLang wants both spellings
        return super().config_fields(architecture) | {"hidden_act": architecture.activation}


def _sum_of(norm: Norm) -> Recomputed:
    return Recomputed(norm.hf.replace(".weight", ".gemma_weight"), norm.hf, _one_more, by_loader=True)


def _one_more(weight: torch.Tensor) -> torch.Tensor:
    return weight + 1.0
