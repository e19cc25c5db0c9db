"""The allow-list of fields of megatron-core's configuration classes, for models that a job built itself.

A field cannot change the forward pass (`FREE`), or is carried over into the `Architecture` (`TAKEN`), or must have a
neutral value (`NEUTRAL`; `NEUTRAL_WITH_EXPERTS` for those that only a mixture of experts reads). A field that is in
none of them, from another version or a subclass, must have its class's default. `docs/megatron_arguments.md` is written
from here (`tools/document_arguments.py`), and a test holds the lists against the installed megatron-core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

LOAD_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")  # losses beside the forward pass

FREE: dict[str, str] = {
    "parallel layout, read from parallel_state and checked against the chunks": (
        "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
        "pipeline_model_parallel_comm_backend sequence_parallel context_parallel_size cp_comm_type "
        "hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank expert_model_parallel_size "
        "expert_tensor_parallel_size moe_extended_tp num_layers_in_first_pipeline_stage "
        "num_layers_in_last_pipeline_stage pipeline_model_parallel_layout account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split"
    ),
    "communication and schedule": (
        "num_microbatches_with_partial_activation_checkpoints async_tensor_model_parallel_allreduce tp_comm_overlap "
        "tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad "
        "tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv "
        "tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend ep_overlap_early_attn_memory_release "
        "variable_seq_lengths overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p "
        "deallocate_pipeline_outputs defer_embedding_wgrad_compute wgrad_deferral_limit "
        "overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage symmetric_ar_type "
        "finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func "
        "moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend moe_deepep_num_sms "
        "moe_hybridep_num_sms moe_shared_expert_overlap"
    ),
    "initialisation, before the weights exist": (
        "perform_initialization use_cpu_initialization init_method output_layer_init_method init_method_std "
        "embedding_init_method embedding_init_method_std init_model_with_meta_device use_te_rng_tracker is_hybrid_model"
    ),
    "precision, the same function rounded differently": (
        "fp16 bf16 params_dtype pipeline_dtype enable_autocast autocast_dtype fp32_residual_connection "
        "attention_softmax_in_fp32 apply_query_key_layer_scaling disable_bf16_reduced_precision_matmul "
        "moe_router_dtype deterministic_mode batch_invariant_mode first_last_layers_bf16 "
        "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16"
    ),
    "kernels and fusions, the same function": (
        "attention_backend gradient_accumulation_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl "
        "bias_activation_fusion masked_softmax_fusion persist_layer_norm memory_efficient_layer_norm "
        "bias_dropout_fusion apply_rope_fusion use_fused_weighted_squared_relu fused_single_qkv_rope "
        "use_te_activation_func transformer_impl moe_grouped_gemm moe_permute_fusion moe_router_fusion "
        "enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps "
        "external_cuda_graph cuda_graph_impl cuda_graph_scope clone_scatter_output_in_embedding "
        "disable_parameter_transpose_cache cuda_graph_modules"
    ),
    "memory": (
        "recompute_granularity recompute_method recompute_num_layers distribute_saved_activations recompute_modules "
        "moe_layer_recompute cpu_offloading cpu_offloading_num_layers _cpu_offloading_context "
        "cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering "
        "fine_grained_activation_offloading offload_modules min_offloaded_tensor_size "
        "activation_func_fp8_input_store hetereogenous_dist_checkpoint"
    ),
    "logging and tests": (
        "timers barrier_with_L1_time log_max_attention_logit moe_per_layer_logging config_logger_dir test_mode"
    ),
    "the loss of training only; auxiliary losses of routers are added to the RL loss": (
        "calculate_per_token_loss moe_aux_loss_coeff moe_z_loss_coeff mtp_loss_scaling_factor"
    ),
    "training only: how far a router's bias moves in a step": "moe_router_bias_update_rate",
    "training only, off in every pass that scores; a warning asks for 0": "hidden_dropout attention_dropout",
    "Megatron's own inference engine, not used here": (
        "flash_decode inference_rng_tracker inference_sampling_seed use_inference_optimized_layers "
        "inference_fuse_tp_communication mlp_chunks_for_prefill cache_mla_latents inference_cuda_graph_scope"
    ),
    "read only beside another field, which is refused": (
        "qk_clip_alpha qk_clip_threshold dsa_indexer_n_heads dsa_indexer_head_dim "
        "dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss linear_conv_kernel_dim "
        "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads fp8_recipe "
        "fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad "
        "tp_only_amax_red kitchen_attention_backend fp4_recipe fp4_quantizer_factory "
        "moe_pad_expert_input_to_capacity moe_token_drop_policy mamba_state_dim "
        "mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path rotary_percent"
    ),
}

TAKEN: dict[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "window_size": "sliding_window, one more, the family: Mistral; None or (keys to the left, 0)",
    "window_attn_skip_freq": "layer_types, the families: Qwen2, Qwen3",
    "add_qkv_bias": "the family: Qwen2",
    "add_bias_linear": "attention_bias and mlp_bias, the family: Llama",
    "qk_layernorm": "the family: Qwen3",
    "num_moe_experts": "num_experts, the family: Qwen3-MoE (with qk_layernorm), else Mixtral",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_layer_freq": "mlp_only_layers",
    "moe_router_pre_softmax": "norm_topk_prob, its opposite",
    "moe_router_score_function": "the family: GLM-4.5 (sigmoid)",
    "moe_router_enable_expert_bias": "the family: GLM-4.5, whose file holds the bias",
    "moe_router_num_groups": "n_group",
    "moe_router_group_topk": "topk_group",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size, or n_shared_experts",
    "moe_shared_expert_gate": "the family: Qwen2-MoE",
    "multi_latent_attention": "the families: DeepSeek-V2, DeepSeek-V3; with qk_layernorm",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "rope_type": "rope_type of latent attention",
    "rotary_base": "rope_theta of latent attention",
    "rotary_scaling_factor": "factor of its YaRN",
    "original_max_position_embeddings": "the same of its YaRN",
    "beta_fast": "the same of its YaRN",
    "beta_slow": "the same of its YaRN",
    "mscale": "the same of its YaRN; 1.0 where mscale_all_dim is 0",
    "mscale_all_dim": "the same of its YaRN",
    "yarn_rotary_scaling_factor": "factor of rope_type yarn, with position_embedding_type='yarn'",
    "yarn_original_max_position_embeddings": "original_max_position_embeddings, likewise",
    "yarn_beta_fast": "beta_fast, likewise",
    "yarn_beta_slow": "beta_slow, likewise",
    "yarn_mscale": "attention_factor, likewise",
    "yarn_mscale_all_dim": "attention_factor, likewise",
    "yarn_correction_range_round_to_int": "truncate, likewise",
}


@dataclass(frozen=True, slots=True)
class Neutral:
    """What a field must be, for the forward pass to be that of a supported decoder."""

    expected: str  # in words, for messages and documentation
    fits: Callable[[Any], bool]


def _is(*values: Any) -> Neutral:
    return Neutral(" or ".join(map(repr, values)), lambda value: value in values)


_OFF, _NONE = _is(False), _is(None)
_NO_SIZE = _is(None, 0)

NEUTRAL: dict[str, Neutral] = {
    "normalization": _is("RMSNorm"),
    "layernorm_zero_centered_gamma": _OFF,
    "activation_func": Neutral(
        "silu, or gelu without experts: hidden_act, the family: Llama", lambda f: f in (F.silu, F.gelu)
    ),
    "gated_linear_unit": _is(True),
    "glu_linear_offset": _is(0.0),
    "activation_func_clamp_value": _NONE,
    "softmax_scale": _NONE,
    "softmax_type": _is("vanilla"),
    "rotary_interleaved": _OFF,
    "no_rope_freq": Neutral("None or 0 in every layer", lambda value: not value or not any(_as_list(value))),
    "mrope_section": _NONE,
    "qk_l2_norm": _OFF,
    "qk_clip": _OFF,
    "attention_output_gate": _OFF,
    "apply_residual_connection_post_layernorm": _OFF,
    "experimental_attention_variant": _NONE,
    "linear_attention_freq": _NONE,
    "heterogeneous_block_specs": _OFF,
    "hybrid_context_parallel": _OFF,
    "mtp_num_layers": _NO_SIZE,
    "mtp_standalone": _OFF,
    "overlap_moe_expert_parallel_comm": _OFF,
    "delay_wgrad_compute": _OFF,
    "fp8": _NONE,
    "fp8_param": _OFF,
    "fp8_dot_product_attention": _OFF,
    "fp8_multi_head_attention": _OFF,
    "fp4": _NONE,
    "fp4_param": _OFF,
    "quant_recipe": _NONE,
    "use_kitchen": _OFF,
    "use_kitchen_attention": _OFF,
}

NEUTRAL_WITH_EXPERTS: dict[str, Neutral] = {
    "moe_router_load_balancing_type": Neutral(
        "one of " + ", ".join(LOAD_BALANCING), lambda value: all(kind in LOAD_BALANCING for kind in _as_list(value))
    ),
    "moe_router_topk_limited_devices": _NONE,
    "moe_router_force_load_balancing": _OFF,
    "moe_router_padding_for_quantization": _OFF,
    "moe_router_padding_for_fp8": _OFF,
    "moe_enable_routing_replay": _OFF,
    "moe_input_jitter_eps": _NONE,
    "moe_token_dropping": _OFF,
    "moe_expert_capacity_factor": _NONE,
    "moe_apply_probs_on_input": _OFF,
    "moe_use_legacy_grouped_gemm": _OFF,
    "moe_latent_size": _NO_SIZE,
}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def classified() -> Iterator[str]:
    """Every field that is known, once for each list that names it."""
    for names in FREE.values():
        yield from names.split()
    yield from TAKEN
    yield from NEUTRAL
    yield from NEUTRAL_WITH_EXPERTS


_KNOWN = frozenset(classified())


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field or argument that this package does not take over."""

    name: str
    given: str
    expected: str


def refused_fields(config: Any) -> list[Refusal]:
    """The fields of a configuration, of any megatron-core version or subclass, that are not taken over as they are."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    rules = NEUTRAL | (NEUTRAL_WITH_EXPERTS if config.num_moe_experts is not None else {})
    found = []
    for name, rule in rules.items():
        if name in fields and not rule.fits(getattr(config, name)):
            found.append(Refusal(name, shown(getattr(config, name)), rule.expected))
    for name, field in fields.items():
        if name not in _KNOWN and not _is_default(field, getattr(config, name)):
            found.append(Refusal(name, shown(getattr(config, name)), "its default, as this field is not known here"))
    return found


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return bool(value is default or value == default)


def shown(value: Any) -> str:
    """A value on one line of a message: functions and classes by their names."""
    return str(getattr(value, "__name__", None) or repr(value))
