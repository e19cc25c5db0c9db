"""A real `GPTModel`, filled from Hugging Face weights, names its parameters as the layout does and computes what
`transformers` computes. One process, fp32; `parity_program.py` does the same over four ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.oracle import (
    DEEPSEEK_V2,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GLM4_MOE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    MOONLIGHT,
    QWEN2,
    QWEN2_MOE,
    QWEN2_WINDOWS,
    QWEN3,
    QWEN3_MOE,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

import megatron_rl
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.engines.megatron.model.model_chunk import chunk_tensors, naming_of
from megatron_rl.models import Architecture, megatron_layout
from megatron_rl.models.hf_config import hf_config_from
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.parallel.context import ParallelContext
from megatron_rl.weights.fill import check_tensors, fill
from megatron_rl.weights.hf_in import load_folder, model_source, read_architecture

assert megatron_rl  # installs the CPU face before megatron.core is imported

ONE = ParallelSizes()
LLAMA3 = replace(
    LLAMA,
    rope_scaling=(
        ("factor", 8.0),
        ("high_freq_factor", 4.0),
        ("low_freq_factor", 1.0),
        ("original_max_position_embeddings", 16),
        ("rope_type", "llama3"),
    ),
)
LARGE_THETA = replace(QWEN2, rope_theta=1e6, norm_eps=1e-5)
UNNORMALISED = replace(QWEN3_MOE, experts=replace(QWEN3_MOE.experts, normalize_weights=False))
WIDE_HEADS = replace(QWEN3, head_dim=8)
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 16}  # shorter than the sequence
LONGROPE |= {"short_factor": (1.0, 1.5), "long_factor": (1.5, 8.0)}
LONG = replace(LLAMA, family="phi3", num_heads=6, num_kv_heads=2, rope_scaling=tuple(sorted(LONGROPE.items())))
CASES = {
    "phi3, beyond the original context": LONG,
    "llama": LLAMA,
    "llama3 rope scaling": LLAMA3,
    "qwen2, tied, bias": LARGE_THETA,
    "qwen3, heads wider than hidden / heads": WIDE_HEADS,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe, weights not rescaled": UNNORMALISED,
    "mistral, sliding window": MISTRAL,
    "qwen2, windows in some layers": QWEN2_WINDOWS,
    "mistral, no window": replace(MISTRAL, window=None),
    "mixtral, sliding window": MIXTRAL,
    "qwen2_moe, gated shared expert": QWEN2_MOE,
    "glm4_moe, sigmoid router": GLM4_MOE,
    "deepseek_v3, YaRN": DEEPSEEK_V3,
    "deepseek_v3 without a latent of queries, halves turn": MOONLIGHT,
    "deepseek_v2, groups scored by their best": DEEPSEEK_V2,
    "deepseek_v2 without groups": DEEPSEEK_V2_LITE,
    "glm4_moe, weights not rescaled": replace(
        GLM4_MOE, experts=replace(GLM4_MOE.experts, normalize_weights=False, chosen_groups=3)
    ),
}


@pytest.fixture(scope="module")
def context() -> ParallelContext:
    return ParallelContext.create(ONE, seed=1)


def random_hf(architecture: Architecture) -> PreTrainedModel:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(hf_config_from(architecture, dtype="float32")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(std=0.3)
    return model


def megatron_logits(architecture: Architecture, context: ParallelContext, source, ids: torch.Tensor) -> torch.Tensor:
    """Logits [1, tokens, vocab] of a Megatron model filled from ``source``, a model or a folder."""
    config = transformer_config(architecture, ONE)
    chunks = build_model(architecture, config, pg_collection=context.collection)
    tensors = chunk_tensors(chunks)
    layout = megatron_layout(architecture, context.grid, padded_vocab(architecture.vocab), naming_of(chunks))
    check_tensors(layout, 0, tensors)
    assert sorted(tensors) == sorted(shard.name for shard in layout.shards(0))
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    if isinstance(source, Path):
        load_folder(source, layout, 0, tensors)
    else:
        fill(layout, 0, tensors, model_source(source)[1])
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        return chunks[0].eval()(ids, positions, None)[..., : architecture.vocab]


@pytest.mark.parametrize("architecture", CASES.values(), ids=list(CASES))
def test_logits_equal_transformers(architecture: Architecture, context: ParallelContext) -> None:
    model = random_hf(architecture)
    ids = torch.randint(0, architecture.vocab, (1, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids).logits
    found = megatron_logits(architecture, context, model, ids)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_real_pretrained_llama_gives_its_logits(llama_folder: Path, context: ParallelContext) -> None:
    architecture = read_architecture(llama_folder)
    ids = torch.randint(3, 512, (1, 64), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        exact, same = (
            AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype).eval()(ids).logits
            for dtype in (torch.float64, torch.float32)
        )
    # fp32 itself is off by 1e-5 on these logits of up to 13, in transformers too.
    found = megatron_logits(architecture, context, llama_folder, ids)
    assert (found - exact).abs().max() <= 2 * (same - exact).abs().max()
    assert (found - same).abs().max() <= 2e-5


@pytest.mark.parametrize("architecture", [LLAMA, QWEN2, QWEN3_MOE, MIXTRAL], ids=lambda a: a.family)
def test_a_value_model_holds_its_layout_and_one_head_more(architecture: Architecture, context: ParallelContext) -> None:
    config = transformer_config(architecture, ONE)
    chunks = build_model(architecture, config, pg_collection=context.collection, value_head=True)
    layout = megatron_layout(architecture, RankGrid(ONE, 1), padded_vocab(architecture.vocab), output_layer=False)
    tensors = chunk_tensors(chunks)
    check_tensors(layout, 0, tensors)
    extra = set(tensors) - {shard.name for shard in layout.shards(0)}
    assert extra
    assert all(name.startswith("output_layer.") for name in extra)
