"""Tiny models of architectures that have no family here, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
DELTA_NET = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
FEW = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4}

# Model type -> what its config says; behind it what is special about it.
CONFIGS: dict[str, dict[str, Any]] = {
    "olmo2": SIZES,  # norms behind the layers
    "olmoe": SIZES | EXPERTS,  # fused experts
    "granite": SIZES | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},  # scaled logits
    "cohere": SIZES | {"logit_scale": 0.25},  # parallel layers, tied
    "starcoder2": SIZES | {"sliding_window": 6, "residual_dropout": 0.1},  # biases, a window, dropout
    "gpt_neox": SIZES | {"rotary_pct": 0.5},  # another name of the output layer in files
    "phi": SIZES,  # a bias in the output layer
    "exaone4": SIZES | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": SIZES | {"no_rope_layers": [1, 0]},
    "stablelm": SIZES,  # attention of its own: padded
    "falcon": FEW | {"num_hidden_layers": 2, "alibi": False},  # one key/value head
    "bloom": FEW | {"n_layer": 2, "n_head": 4},  # ALiBi: no positions
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # learned positions
    "qwen3_next": SIZES
    | EXPERTS
    | DELTA_NET
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},  # gated delta net
    "qwen3_5_text": SIZES | DELTA_NET,
}
PADDED = {"stablelm", "falcon", "bloom", "qwen3_next", "qwen3_5_text"}  # the others are packed


def tiny_model(model_type: str, seed: int = 0, dropout: bool = True) -> PreTrainedModel:
    """A model whose every weight matters: the norms' and the biases' too.

    Args:
        dropout: as the config has it; False: none.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, dtype="float32", **CONFIGS[model_type], **TOKENS)
    if not dropout:
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
