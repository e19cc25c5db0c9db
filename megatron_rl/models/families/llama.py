"""Llama 2 to 3.2, and every model published under their model type (DeepSeek-LLM, DeepSeek-Coder, Yi, SmolLM2):
the dense decoder itself."""

from __future__ import annotations

from megatron_rl.models.family import FAMILIES, ModelFamily


@FAMILIES.register("llama")
class Llama(ModelFamily):
    """Biases in attention, in the feed-forward layers, or in both, and another gate than SiLU, where the config says
    so. SGLang has SiLU alone."""

    bias_key = "attention_bias"
    biased_output = True
    mlp_bias_key = "mlp_bias"
    activations = ("gelu", "gelu_pytorch_tanh", "silu")
