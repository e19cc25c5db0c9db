"""Megatron-Core's own data-parallel wrapper, optimizer and learning-rate schedule, from `OptimizerConfig`.

Nothing here is ours but the defaults: `DistributedDataParallel`, `get_megatron_optimizer` and `OptimizerParamScheduler`
do the work. A job that already has them passes its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.grad_scaler import DynamicGradScaler, MegatronGradScaler
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import OptimizerConfig


def wrap_data_parallel(
    chunks: Sequence[torch.nn.Module], optimizer_config: OptimizerConfig, *, groups: Any = None
) -> list[DistributedDataParallel]:
    """Wrap model chunks in Megatron's DDP and give every data-parallel rank the same weights."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=optimizer_config.gradient_reduce_in_fp32,
        overlap_grad_reduce=optimizer_config.overlap_gradient_reduce,
        use_distributed_optimizer=optimizer_config.is_sharded,
        check_for_nan_in_grad=False,  # a NaN is reported by the worker with the name of the step, see `Actor.optimize`
    )
    extra = {} if groups is None else {"pg_collection": groups}
    for parameter in experts_reduced_as_dense(chunks):
        parameter.allreduce = False  # type: ignore[attr-defined]
    wrapped = [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0, **extra)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def experts_reduced_as_dense(chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Experts whose gradients would be summed over the wrong ranks.

    With ep=1 Megatron-Core reduces experts like dense weights, over data-parallel ranks (tensor_parallel/layers.py:
    ``allreduce``). Where etp is not tp, tensor-parallel ranks have other tokens, too, and each would keep its own
    gradient. ``allreduce=False``, as with ep > 1, reduces over the expert-data-parallel ranks.
    """
    config: Any = chunks[0].config
    sizes = config.tensor_model_parallel_size, config.expert_tensor_parallel_size or config.tensor_model_parallel_size
    if config.num_moe_experts is None or sizes[0] == sizes[1]:
        return []
    named = [item for chunk in chunks for item in chunk.named_parameters()]
    return [p for name, p in named if ".experts." in name and getattr(p, "allreduce", True)]


def precision_of(chunks: Sequence[torch.nn.Module]) -> torch.dtype:
    """The dtype of the weights, apart from norms and routers that are kept in fp32."""
    found = {parameter.dtype for chunk in chunks for parameter in chunk.parameters()}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in found), torch.float32)


def precision_fields(dtype: torch.dtype) -> dict[str, Any]:
    """Fields of Megatron's `OptimizerConfig` for weights in ``dtype``.

    Megatron-Core's first loss scale of 2^32 overflows fp16 about twenty times before a step succeeds, each time with a
    batch of samples.
    """
    return {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "initial_loss_scale": 2.0**16,
    }


def build_optimizer(chunks: list[DistributedDataParallel], optimizer_config: OptimizerConfig) -> MegatronOptimizer:
    """Megatron's optimizer over DDP-wrapped chunks: sharded, and its parameters gathered, as their wrapper expects.

    Raises:
        ConfigError: the wrapper shards the optimizer, and ``optimizer_config`` names one that cannot be.
    """
    ddp = chunks[0].ddp_config
    if ddp.use_distributed_optimizer and optimizer_config.optimizer != "adam":
        raise ConfigError(
            f"optimizer={optimizer_config.optimizer}, but the model chunks are wrapped for Megatron's distributed "
            "optimizer, which is Adam: wrap them with use_distributed_optimizer=False, or choose adam"
        )
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer=optimizer_config.optimizer,
            lr=optimizer_config.learning_rate,
            min_lr=optimizer_config.min_learning_rate,
            weight_decay=optimizer_config.weight_decay,
            adam_beta1=optimizer_config.beta1,
            adam_beta2=optimizer_config.beta2,
            adam_eps=optimizer_config.epsilon,
            sgd_momentum=0.0,
            clip_grad=optimizer_config.clip_gradient,
            use_distributed_optimizer=ddp.use_distributed_optimizer,
            overlap_param_gather=ddp.overlap_param_gather,
            **precision_fields(precision_of(chunks)),
        ),
        chunks,
    )


def loss_scalers(optimizer: MegatronOptimizer) -> list[MegatronGradScaler]:
    """Of the optimizer or of each part of a chained one; empty without loss scaling."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.grad_scaler for part in parts if getattr(part, "grad_scaler", None) is not None]


def can_fall(scaler: MegatronGradScaler) -> bool:
    """Whether an overflow can still lower the loss scale."""
    return isinstance(scaler, DynamicGradScaler) and bool(scaler.scale > scaler.min_scale)


@contextlib.contextmanager
def gradient_hooks(chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> Iterator[None]:
    """While open, Megatron's schedules use the gradient hooks of these chunks and the loss scale of this optimizer.

    Only then: the configuration may belong to several models, and Megatron-LM's own loop refuses one that has a
    ``no_sync_func`` already. What the job has set itself for this model stays.
    """
    config: Any = chunks[0].config
    syncs = [chunk.no_sync for chunk in chunks]
    starts = [chunk.start_grad_sync for chunk in chunks]
    hooks = {
        "finalize_model_grads_func": finalize_model_grads,
        "grad_scale_func": optimizer.scale_loss,
        "no_sync_func": syncs[0] if len(syncs) == 1 else syncs,
    }
    if chunks[0].ddp_config.overlap_grad_reduce:  # type: ignore[union-attr]
        hooks["grad_sync_func"] = starts[0] if len(starts) == 1 else starts
    own = [*chunks, optimizer]
    before = {name: getattr(config, name) for name in hooks}
    for name, hook in hooks.items():
        if before[name] is None or _of_another(before[name], own):
            setattr(config, name, hook)
    try:
        yield
    finally:
        for name, hook in before.items():
            setattr(config, name, hook)


def _of_another(hook: Any, own: Sequence[Any]) -> bool:
    """Whether a hook is a method of another model's wrapper or optimizer: it was left in a shared configuration."""
    owners = [getattr(one, "__self__", None) for one in (hook if isinstance(hook, list) else [hook])]
    models = [owner for owner in owners if isinstance(owner, (DistributedDataParallel, MegatronOptimizer))]
    return any(all(owner is not one for one in own) for owner in models)


def build_scheduler(optimizer: MegatronOptimizer, optimizer_config: OptimizerConfig) -> OptimizerParamScheduler:
    """Learning-rate schedule counted in optimizer steps. A resumed run goes on with these settings at the checkpoint's
    step: a longer run decays over its new length, a changed learning rate counts.

    Raises:
        ConfigError: a decay without its length.
    """
    if optimizer_config.decay != "constant" and not optimizer_config.decay_steps:
        raise ConfigError(
            f"decay={optimizer_config.decay} without decay_steps: give the number of optimizer steps it takes"
        )
    steps = max(optimizer_config.decay_steps, optimizer_config.warmup_steps + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optimizer_config.learning_rate,
        min_lr=optimizer_config.min_learning_rate,
        lr_warmup_steps=optimizer_config.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=optimizer_config.decay,
        start_wd=optimizer_config.weight_decay,
        end_wd=optimizer_config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
