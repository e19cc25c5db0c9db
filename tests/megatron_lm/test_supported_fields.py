"""Every field of megatron-core's configuration and every argument of `GPTModel`: taken over, or refused by name.

Accepted values are compared by logits with `transformers` on the exported description, refused ones by message.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import logging
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from models import oracle
from transformers import AutoModelForCausalLM

from megatron_rl.config import ConfigError
from megatron_rl.engines.build import build_engine
from megatron_rl.engines.megatron.adopted_architecture import ARGUMENTS
from megatron_rl.engines.megatron.engine import MegatronEngine
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.models.megatron_architecture import architecture_from_megatron
from megatron_rl.models.megatron_fields import NEUTRAL, NEUTRAL_WITH_EXPERTS, classified, refused_fields
from megatron_rl.parallel import ParallelSizes
from megatron_rl.weights.hf_out import save_hf
from megatron_rl.workers.actor_config import ActorConfig
from megatron_rl.workers.job_context import running_context

VOCAB = 96
DENSE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "normalization": "RMSNorm",
    "activation_func": F.silu,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": True,
    "init_method_std": 0.3,
    "moe_token_dispatcher_type": "alltoall",
}
YARN = {  # attributes of the configuration, which has no such fields
    "yarn_rotary_scaling_factor": 8.0,
    "yarn_original_max_position_embeddings": 16,
    "yarn_beta_fast": 8.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": None,
    "yarn_mscale_all_dim": None,
    "yarn_correction_range_round_to_int": True,
}
YARN_WEIGHTS = {"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.5, "yarn_correction_range_round_to_int": False}
MOE = DENSE | {"qk_layernorm": True, "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}


@pytest.fixture(scope="module")
def context():
    """A world of one rank, closed behind these tests."""
    yield running_context(seed=1)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build(context, fields: dict[str, Any], **arguments: Any) -> GPTModel:
    torch.manual_seed(5)
    config = TransformerConfig(**{name: value for name, value in fields.items() if not name.startswith("yarn_")})
    vars(config).update((name, value) for name, value in fields.items() if name.startswith("yarn_"))
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    given = {"position_embedding_type": "rope", "max_sequence_length": 64} | arguments
    return GPTModel(config, spec, vocab_size=VOCAB, pg_collection=context.collection, **given)


def adopt(context, chunk: torch.nn.Module, compare: bool = False) -> MegatronEngine:
    return build_engine(
        chunk, context, ActorConfig(compare_with_export=compare), name="actor", vocab=VOCAB, frozen=True
    )


@torch.no_grad()
def exported_logits(model: MegatronEngine, tokens: torch.Tensor, folder) -> torch.Tensor:
    save_hf(model.layout, model.tensors(), model.architecture, folder, rank=0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


def test_every_field_of_the_installed_configuration_classes_is_classified_once():
    fields = {field.name for cls in (TransformerConfig, MLATransformerConfig) for field in dataclasses.fields(cls)}
    counts = Counter(classified())
    assert fields - counts.keys() == set()
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_argument_of_the_installed_model_is_classified():
    arguments = set(inspect.signature(GPTModel.__init__).parameters) - {"self"}
    assert arguments - ARGUMENTS.keys() == set()


TAKEN_OVER: dict[str, tuple[dict, dict]] = {
    "rotary_base": (DENSE, {"rotary_base": 500}),
    "rope_scaling": (DENSE, {"rope_scaling": True, "rope_scaling_factor": 4.0, "rotary_base": 500000}),
    "rotary_percent": (DENSE, {"rotary_percent": 0.5}),
    "seq_len_interpolation_factor": (DENSE, {"seq_len_interpolation_factor": 2.5}),
    "share_embeddings_and_output_weights": (DENSE, {"share_embeddings_and_output_weights": True}),
    "layernorm_epsilon": (DENSE | {"layernorm_epsilon": 0.1}, {}),
    "position_embedding_type": (DENSE | YARN, {"position_embedding_type": "yarn", "rotary_base": 500000}),
    "yarn_mscale": (DENSE | YARN | YARN_WEIGHTS, {"position_embedding_type": "yarn"}),
    "activation_func": (DENSE | {"activation_func": F.gelu}, {}),
    "add_qkv_bias": (DENSE | {"add_qkv_bias": True}, {}),
    "add_bias_linear": (DENSE | {"add_bias_linear": True}, {}),
    "qk_layernorm, kv_channels": (DENSE | {"qk_layernorm": True, "kv_channels": 16}, {}),
    "num_query_groups": (DENSE | {"num_query_groups": 1}, {}),
    "apply_query_key_layer_scaling": (DENSE | {"apply_query_key_layer_scaling": True}, {}),
    "recompute_granularity": (DENSE | {"recompute_granularity": "selective"}, {}),
    "window_size": (DENSE | {"window_size": (8, 0)}, {}),
    "window_attn_skip_freq": (
        DENSE | {"add_qkv_bias": True, "window_size": (8, 0), "window_attn_skip_freq": [0, 1]},
        {},
    ),
    "num_moe_experts": (MOE, {}),
    "num_moe_experts, window_size": (MOE | {"qk_layernorm": False, "window_size": (8, 0)}, {}),
    "moe_router_pre_softmax": (MOE | {"moe_router_pre_softmax": True}, {}),
    "moe_layer_freq": (MOE | {"moe_layer_freq": [0, 1]}, {}),
    "moe_router_topk": (MOE | {"moe_router_topk": 3}, {}),
    "moe_shared_expert_gate": (
        MOE
        | {"qk_layernorm": False, "add_qkv_bias": True, "moe_router_pre_softmax": True}
        | {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True},
        {},
    ),
    "moe_aux_loss_coeff": (MOE | {"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.1}, {}),
}


@pytest.mark.parametrize("case", TAKEN_OVER)
def test_what_is_taken_over_has_the_logits_of_its_export(case, context, tmp_path):
    fields, arguments = TAKEN_OVER[case]
    chunk = build(context, fields, **arguments)
    with torch.no_grad():  # norms and biases that matter
        for parameter in chunk.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    chunk.eval()
    model = adopt(context, chunk, compare=True)
    tokens = torch.arange(40)[None] * 7 % VOCAB
    with torch.no_grad():
        own = chunk(tokens, torch.arange(40)[None], None)
    torch.testing.assert_close(exported_logits(model, tokens, tmp_path / "hf"), own, rtol=1e-4, atol=2e-4)


def test_fused_geglu_is_exported_as_the_approximation_that_it_is():
    config = TransformerConfig(**DENSE | {"activation_func": F.gelu, "bias_activation_fusion": True})
    assert architecture_from_megatron(config, VOCAB, tied=False).activation == "gelu_pytorch_tanh"
    config.use_te_activation_func = True
    with pytest.raises(ConfigError, match="use_te_activation_func=True with activation_func=gelu"):
        architecture_from_megatron(config, VOCAB, tied=False)
    with pytest.raises(ConfigError, match="activation=gelu"):
        architecture_from_megatron(TransformerConfig(**MOE | {"activation_func": F.gelu}), VOCAB, tied=False)


def test_the_amplitude_of_yarn_without_its_frequencies_is_refused(context):
    with pytest.raises(ConfigError, match=r"yarn_rotary_scaling_factor=8\.0"):
        adopt(context, build(context, DENSE | YARN))


@pytest.mark.parametrize("name", ["GLM4_MOE", "DEEPSEEK_V3", "MOONLIGHT", "DEEPSEEK_V2"])
def test_routers_and_latents_of_our_own_layer_spec_are_taken_over_whole(name, context):
    architecture = dataclasses.replace(getattr(oracle, name), vocab=VOCAB)
    torch.manual_seed(5)
    config = transformer_config(architecture, ParallelSizes(), init_method_std=0.3)
    (chunk,) = build_model(architecture, config, pg_collection=context.collection)
    with torch.no_grad():
        for buffer_name, buffer in chunk.named_buffers():
            if "expert_bias" in buffer_name:
                buffer.normal_(std=0.3)
    assert adopt(context, chunk.eval(), compare=True).architecture == architecture


REFUSED_ARGUMENTS: dict[str, dict] = {
    "position_embedding_type='learned_absolute'": {"position_embedding_type": "learned_absolute"},
    "position_embedding_type='none'": {"position_embedding_type": "none"},
    "rotary_pos_emb=": {"rope_scaling": True, "seq_len_interpolation_factor": 3.0, "rotary_base": 500000},
}


@pytest.mark.parametrize("message", REFUSED_ARGUMENTS)
def test_arguments_that_no_family_has_are_refused_by_name(message, context):
    with pytest.raises(ConfigError, match=message.replace("'", ".")):
        adopt(context, build(context, DENSE, **REFUSED_ARGUMENTS[message]))


def test_frequencies_are_taken_over_as_they_are_or_refused(context):
    chunk = build(context, DENSE)
    chunk.rotary_pos_emb.inv_freq = chunk.rotary_pos_emb.inv_freq / 1.5
    scaling = adopt(context, chunk, compare=True).architecture.rope_scaling
    assert dict(scaling) == {"factor": pytest.approx(1.5), "rope_type": "linear"}
    chunk.rotary_pos_emb.inv_freq[1] *= 1.1
    with pytest.raises(ConfigError, match="rotary_pos_emb=frequencies"):
        adopt(context, chunk)


OTHER: dict[str, Any] = {  # a value that is not neutral, for every field that must be
    "normalization": "LayerNorm",
    "activation_func": F.relu,
    "gated_linear_unit": False,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "softmax_scale": 0.5,
    "softmax_type": "learnable",
    "no_rope_freq": [0, 1],
    "mrope_section": [2, 1, 1],
    "experimental_attention_variant": "dsa",
    "linear_attention_freq": 2,
    "mtp_num_layers": 1,
    "fp8": "hybrid",
    "fp4": "e2m1",
    "quant_recipe": object(),
    "moe_router_load_balancing_type": "sinkhorn",
    "moe_router_topk_limited_devices": 1,
    "moe_input_jitter_eps": 0.1,
    "moe_expert_capacity_factor": 1.0,
    "moe_latent_size": 8,
}


@pytest.mark.parametrize("name", [*NEUTRAL, *NEUTRAL_WITH_EXPERTS])
def test_a_field_off_its_neutral_value_is_refused_by_name(name):
    config = TransformerConfig(**(MOE if name in NEUTRAL_WITH_EXPERTS else DENSE))
    assert refused_fields(config) == []
    setattr(config, name, OTHER.get(name, True))
    with pytest.raises(ConfigError, match=f"{name}="):
        architecture_from_megatron(config, VOCAB, tied=False)


@dataclasses.dataclass
class ForkedConfig(TransformerConfig):
    logit_softcap: float | None = None


def test_an_unknown_field_of_a_subclass_is_refused_unless_it_has_its_default():
    assert refused_fields(ForkedConfig(**DENSE)) == []
    with pytest.raises(ConfigError, match=r"logit_softcap=30\.0"):
        architecture_from_megatron(ForkedConfig(**DENSE, logit_softcap=30.0), VOCAB, tied=False)


def test_unknown_parameters_and_modules_are_refused_by_name(context):
    chunk = build(context, DENSE)
    chunk.decoder.layers[0].register_parameter("gate", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ConfigError, match=r"decoder\.layers\.0\.gate"):
        adopt(context, chunk)
    chunk = build(context, DENSE)
    chunk.decoder.layers[1].add_module("extra", torch.nn.Tanh())
    with pytest.raises(ConfigError, match=r"decoder\.layers\.1\.extra=torch.*Tanh"):
        adopt(context, chunk)


def test_dropout_is_named_with_its_remedy(context, caplog):
    with caplog.at_level(logging.WARNING, "megatron_rl"):
        adopt(context, build(context, DENSE | {"hidden_dropout": 0.1}))
    assert "hidden_dropout=0.1" in caplog.text
    assert "--hidden-dropout 0" in caplog.text


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("document_arguments", ROOT / "tools" / "document_arguments.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.TARGET.read_text() == tool.document(), "run: python tools/document_arguments.py"
