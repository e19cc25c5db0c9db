"""A training job as Megatron-LM builds it, in the names of its arguments, for tests: nothing here is megatron_rl's.

The order is that of Megatron-LM's ``setup_model_and_optimizer``: a model provider for each chunk, tensor-parallel
attributes, ``Float16Module``, ``DistributedDataParallel``, ``get_megatron_optimizer``, ``OptimizerParamScheduler``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class JobArguments:
    """Megatron-LM's own argument names; the defaults are a tiny decoder of Llama's kind."""

    num_layers: int = 4
    hybrid_layer_pattern: str | None = None
    hidden_size: int = 32
    ffn_hidden_size: int = 64
    num_attention_heads: int = 4
    num_query_groups: int = 2
    padded_vocab_size: int = 128
    max_position_embeddings: int = 128
    rotary_base: int = 10000
    untie_embeddings_and_output_weights: bool = True
    num_experts: int | None = None
    qk_layernorm: bool = False
    bf16: bool = False
    fp16: bool = False
    initial_loss_scale: float = 2.0**32
    hysteresis: int = 2
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    optimizer: str = "adam"
    lr: float = 1e-2
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    seed: int = 1234

    @property
    def params_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


@dataclass
class Job:
    """What Megatron-LM's setup hands to its training loop."""

    model: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    opt_param_scheduler: OptimizerParamScheduler
    config: TransformerConfig


def initialize(args: JobArguments) -> None:
    """Megatron-LM's ``initialize_megatron``: the groups and the seeds."""
    interleaved = args.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=interleaved,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=1 if args.num_experts else None,
    )
    stage_seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def transformer_config(args: JobArguments) -> TransformerConfig:
    """As ``core_transformer_config_from_args`` fills it; dropout off, as for any policy that samples."""
    interleaved = args.virtual_pipeline_model_parallel_size is not None
    experts: dict[str, Any] = {}
    if args.num_experts:
        experts = {
            "num_moe_experts": args.num_experts,
            "moe_router_topk": 2,
            "moe_router_pre_softmax": False,
            "moe_ffn_hidden_size": args.ffn_hidden_size,
            "moe_router_load_balancing_type": "none",
            "expert_model_parallel_size": args.expert_model_parallel_size,
            "expert_tensor_parallel_size": 1,
        }
    return TransformerConfig(
        num_layers=len(args.hybrid_layer_pattern.replace("|", "")) if args.hybrid_layer_pattern else args.num_layers,
        is_hybrid_model=args.hybrid_layer_pattern is not None,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        normalization="RMSNorm",
        qk_layernorm=args.qk_layernorm,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=args.bf16,
        fp16=args.fp16,
        params_dtype=args.params_dtype,
        pipeline_dtype=args.params_dtype,
        use_cpu_initialization=True,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        moe_token_dispatcher_type="alltoall",
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **experts,
    )


def local_provider(args: JobArguments, config: TransformerConfig) -> Callable[..., GPTModel]:
    """A model provider as in pretrain_gpt.py with ``--transformer-impl local``."""

    def provide(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> GPTModel:
        if args.num_experts:
            spec: Any = get_gpt_decoder_block_spec(
                config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
            )
        else:
            spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization="RMSNorm")
        return GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )

    return provide


def get_model(args: JobArguments, config: TransformerConfig, provider: Callable[..., GPTModel]) -> list[GPTModel]:
    """A rank's bare chunks, in their precision."""
    chunks = []
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    stages = args.virtual_pipeline_model_parallel_size or 1
    for stage in range(stages):
        chunk = provider(
            pre_process=first and stage == 0,
            post_process=last and stage == stages - 1,
            vp_stage=stage if stages > 1 else None,
        )
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunks.append(chunk)
    return chunks


def float16(args: JobArguments, config: TransformerConfig, chunks: list[GPTModel]) -> list[torch.nn.Module]:
    """``Float16Module`` around each chunk of a bf16 or fp16 job."""
    return [Float16Module(config, chunk) if args.bf16 or args.fp16 else chunk for chunk in chunks]


def wrap(args: JobArguments, config: TransformerConfig, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Megatron's ``DistributedDataParallel`` around each chunk."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        use_distributed_optimizer=args.use_distributed_optimizer,
        check_for_nan_in_grad=not args.fp16,
    )
    wrapped: list[torch.nn.Module] = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(model)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def optimizer_of(args: JobArguments, model: list[torch.nn.Module]) -> MegatronOptimizer:
    """As ``get_megatron_optimizer_config`` and ``get_megatron_optimizer`` make it."""
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer=args.optimizer,
            lr=args.lr,
            min_lr=0.0,
            weight_decay=0.01,
            adam_eps=args.adam_eps,
            sgd_momentum=0.0,
            clip_grad=args.clip_grad,
            bf16=args.bf16,
            fp16=args.fp16,
            params_dtype=args.params_dtype,
            initial_loss_scale=args.initial_loss_scale,
            hysteresis=args.hysteresis,
            use_distributed_optimizer=args.use_distributed_optimizer,
            overlap_param_gather=args.overlap_param_gather,
        ),
        model,
    )


def build(
    args: JobArguments,
    fill: Callable[[list[GPTModel]], None] | None = None,
    provider: Callable[..., Callable[..., GPTModel]] = local_provider,
) -> Job:
    """The whole setup.

    Args:
        fill: writes a checkpoint's weights into the bare chunks, before anything wraps them.
        provider: makes the model provider from arguments and configuration.
    """
    config = transformer_config(args)
    chunks = get_model(args, config, provider(args, config))
    if fill is not None:
        fill(chunks)
    model = wrap(args, config, float16(args, config, chunks))
    optimizer = optimizer_of(args, model)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=100,
        lr_decay_style="constant",
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=100,
        wd_incr_style="constant",
    )
    return Job(model, optimizer, scheduler, config)
