"""What the builder makes of an architecture, on one rank; layouts over ranks are in test_model_layouts.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import megatron_rl
from megatron_rl.config import ConfigError
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.engines.megatron.model.hidden_states import hidden_states
from megatron_rl.engines.megatron.model.model_chunk import layer_indices, output_weight, supports_packing, unwrap
from megatron_rl.engines.megatron.model.rms_norm import RMSNorm
from megatron_rl.engines.megatron.model.rope import inverse_frequencies
from megatron_rl.engines.megatron.model.value_head import ValueHead
from megatron_rl.models import Architecture
from megatron_rl.models.architecture import Experts
from megatron_rl.parallel import ParallelSizes
from megatron_rl.parallel.context import ParallelContext

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # isort: skip  (after the CPU face)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module

assert megatron_rl

TIED = Architecture("qwen3", 3, 32, 64, 4, 2, 8, 90, tied=True, qk_norm=True)
UNTIED = replace(TIED, tied=False)
SPARSE = replace(UNTIED, experts=Experts(4, 2, 24, dense_layers=(1,)))
ONE = ParallelSizes()


@pytest.fixture(scope="module")
def context() -> ParallelContext:
    return ParallelContext.create(ONE, seed=1)


def build(context: ParallelContext, architecture: Architecture, **options) -> GPTModel:
    (model,) = build_model(
        architecture, transformer_config(architecture, ONE), pg_collection=context.collection, **options
    )
    return model


def forward(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


TOKENS = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("architecture", [TIED, UNTIED, SPARSE], ids=["tied", "untied", "sparse"])
def test_hidden_states_times_the_output_weight_are_the_logits(context, architecture):
    model = build(context, architecture)
    logits = forward(model, TOKENS)
    with hidden_states(model):
        hidden = forward(model, TOKENS)
    assert logits.shape == (2, 12, 128)  # 90 padded to a multiple of 128
    assert hidden.shape == (2, 12, 32)
    torch.testing.assert_close(hidden @ output_weight(model).t(), logits)
    assert torch.equal(forward(model, TOKENS), logits)  # the model is as it was


def test_hidden_states_leaves_the_model_as_it_was_after_an_error(context):
    model = build(context, UNTIED)
    logits = forward(model, TOKENS)
    with pytest.raises(IndexError), hidden_states(model):
        forward(model, TOKENS + 1000)
    assert torch.equal(forward(model, TOKENS), logits)


def test_output_weight_is_the_embedding_when_tied(context):
    tied, untied = build(context, TIED), build(context, UNTIED)
    assert output_weight(tied) is tied.embedding.word_embeddings.weight
    assert output_weight(untied) is untied.output_layer.weight


def test_wrapped_models_are_seen_through(context):
    model = build(context, UNTIED)
    config = transformer_config(UNTIED, ONE, dtype=torch.bfloat16)
    wrapped = Float16Module(config, model)
    assert unwrap(wrapped) is model
    assert layer_indices(wrapped) == (0, 1, 2)
    with hidden_states(wrapped):
        assert forward(wrapped, TOKENS).shape == (2, 12, 32)
    with pytest.raises(ValueError, match="expected a Megatron-Core language model"):
        unwrap(nn.Linear(2, 2))


def test_packing_is_refused_for_models_with_megatrons_local_attention(context):
    config = transformer_config(UNTIED, ONE)
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    stock = GPTModel(config, spec, vocab_size=128, max_sequence_length=64, pg_collection=context.collection)
    assert not supports_packing(stock)
    assert supports_packing(build(context, UNTIED))
    with hidden_states(stock):
        mask = torch.ones(12, 12).triu(1).bool()[None, None]
        assert stock(TOKENS, torch.arange(12).expand_as(TOKENS), mask).shape == (2, 12, 32)


def test_dense_layers_of_a_sparse_model_are_where_the_architecture_says(context):
    layers = build(context, SPARSE).decoder.layers
    assert [layer.is_moe_layer for layer in layers] == [True, False, True]


def test_norms_match_torch_and_follow_the_parameters_dtype(context):
    config = transformer_config(UNTIED, ONE)
    norm = RMSNorm(config, 16, eps=1e-3)
    norm.weight.data.normal_()
    x = torch.randn(5, 16)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (16,), norm.weight, 1e-3))
    half = RMSNorm(transformer_config(UNTIED, ONE, dtype=torch.bfloat16), 16)
    assert half.weight.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_a_value_head_starts_at_zero_and_gives_fp32_values(context):
    model = build(context, TIED, value_head=True)
    assert isinstance(model.output_layer, ValueHead)
    values = forward(model, TOKENS)
    assert values.shape == (2, 12, 1)
    assert values.dtype == torch.float32
    assert (values == 0).all()
    model.output_layer.weight.data.fill_(1.0)
    with hidden_states(model):  # a value head is not an output layer: nothing is replaced
        assert forward(model, TOKENS).shape == (2, 12, 1)
    forward(model, TOKENS).sum().backward()
    assert model.embedding.word_embeddings.weight.grad.abs().sum() > 0


def test_a_value_head_is_saved_as_the_output_layers_weight(context):
    model = build(context, TIED, value_head=True)
    metadata = {"dp_cp_group": context.collection.dp_cp}
    saved = model.sharded_state_dict(metadata=metadata)
    entry = saved["output_layer.weight"]
    assert entry.global_shape == (1, 32)
    assert entry.data.data_ptr() == model.output_layer.weight.data_ptr()


def test_rotary_frequencies_follow_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=scaling | {"rope_theta": 5e5})
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    architecture = replace(UNTIED, head_dim=128, rope_theta=5e5, rope_scaling=tuple(sorted(scaling.items())))
    torch.testing.assert_close(inverse_frequencies(architecture), theirs, rtol=1e-6, atol=0)
    assert (theirs != inverse_frequencies(replace(architecture, rope_scaling=()))).sum() > 32


def test_unknown_rope_scaling_is_refused():
    architecture = replace(UNTIED, rope_scaling=(("rope_type", "dynamic"),))
    with pytest.raises(ConfigError, match="rope_scaling type 'dynamic' is not supported"):
        inverse_frequencies(architecture)


@pytest.mark.parametrize(
    ("architecture", "sizes", "message"),
    [
        (TIED, {"tp": 3}, "tp=3 does not divide num_heads=4"),
        (replace(TIED, num_heads=6, num_kv_heads=2), {"tp": 3, "pp": 1}, "ffn=64"),
        (replace(TIED, num_heads=12, ffn=96, num_kv_heads=4), {"tp": 6}, "tp=6 and num_kv_heads=4"),
        (TIED, {"pp": 4}, "has only 3 layers"),
        (TIED, {"vpp": 2}, "vpp=2 needs pp"),
        (TIED, {"ep": 2}, "has no experts"),
        (SPARSE, {"ep": 3}, "ep=3 does not divide num_experts=4"),
        (SPARSE, {"tp": 2}, "need sequence_parallel=true"),
    ],
)
def test_sizes_that_do_not_fit_the_architecture_are_refused(architecture, sizes, message):
    with pytest.raises(ConfigError, match=message):
        transformer_config(architecture, ParallelSizes(**sizes))


def test_overrides_reach_megatron_and_the_rest_has_our_defaults():
    config = transformer_config(TIED, ParallelSizes(pp=2), recompute=True, init_method_std=0.5)
    assert config.init_method_std == 0.5
    assert config.calculate_per_token_loss
    assert config.recompute_granularity == "full"
    assert str(config.pipeline_model_parallel_layout.layout[0][0]).count("decoder") == 2  # 3 layers: 2 and 1
