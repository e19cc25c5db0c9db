"""Gemma: norms around 1, scaled embeddings, GELU, tied embeddings; never a window."""

from __future__ import annotations

from megatron_rl.models.family import FAMILIES, ModelFamily


@FAMILIES.register("gemma")
class Gemma(ModelFamily):
    """SGLang's norms hold 1 + weight."""

    norm_offset = 1.0
    scaled_embedding = True
    activations = ("gelu_pytorch_tanh",)
    bias_key = "attention_bias"
    biased_output = True
