"""One file for each Hugging Face model type that is supported; importing this registers them all."""

from __future__ import annotations

from megatron_rl.models.families import (  # noqa: F401
    deepseek_v2,
    deepseek_v3,
    gemma,
    gemma2,
    gemma3_text,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
