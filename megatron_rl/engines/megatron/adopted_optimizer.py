"""The optimizer that a job brings: Megatron-Core's own as it is, a plain torch one inside Megatron-Core's wrapper.

An optimizer that does not train the given model chunks, or does not fit how DistributedDataParallel wraps them, is
refused before the first step, with the same message on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.engines.megatron.optimizer import (
    experts_reduced_as_dense,
    precision_fields,
    precision_of,
)
from megatron_rl.parallel import ParallelContext

MAKE_ONE = "get_megatron_optimizer(config, chunks)"
PLAIN = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)  # Megatron-Core has more elsewhere
WANTED = f"expected Megatron-Core's ({MAKE_ONE}), or a torch.optim optimizer over the model chunks' parameters"


def ddp_config_of(chunks: Sequence[torch.nn.Module]) -> DistributedDataParallelConfig | None:
    """What the chunks are wrapped with; None where they are bare.

    Raises:
        ConfigError: chunks are wrapped differently.
    """
    found = [getattr(chunk, "ddp_config", None) for chunk in chunks]
    if any(config != found[0] for config in found):
        bare = sum(config is None for config in found)
        raise ConfigError(
            f"{bare} of {len(chunks)} model chunks are not wrapped in DistributedDataParallel: wrap all, or none"
            if bare
            else "the model chunks' DistributedDataParallel have different configurations "
            f"({_difference(found)}): give all chunks of a model the same DistributedDataParallelConfig"
        )
    return found[0]


def _difference(configs: Sequence[Any]) -> str:
    first, other = vars(configs[0]), vars(next(config for config in configs if config != configs[0]))
    return ", ".join(f"{name}={first[name]} and {other[name]}" for name in first if first[name] != other.get(name))


def require_scheduler(scheduler: Any, optimizer: Any) -> None:
    """Raise ConfigError unless ``scheduler`` is Megatron-Core's and drives ``optimizer``, or None."""
    if scheduler is None:
        return
    if not isinstance(scheduler, OptimizerParamScheduler):
        raise ConfigError(
            f"scheduler is a {_kind(scheduler)}, expected Megatron-Core's OptimizerParamScheduler or None: leave it "
            "out, and step a schedule of another kind yourself after each update"
        )
    if optimizer is None:
        raise ConfigError(
            "a scheduler was given without the optimizer that it drives: give both, or leave both out and set "
            "config.optimizer (decay, warmup_steps)"
        )
    driven, given = ({id(group) for group in one.param_groups} for one in (scheduler.optimizer, optimizer))
    if driven and given and not driven & given:
        raise ConfigError(
            f"the scheduler drives another {_kind(scheduler.optimizer)} than the one that was given: make it with "
            "OptimizerParamScheduler(optimizer, ...)"
        )


def require_fitting(optimizer: Any, chunks: Sequence[torch.nn.Module], context: ParallelContext) -> None:
    """Raise ConfigError on every rank unless ``optimizer`` trains these chunks, wrapped or bare, on all. Collective."""
    found = [problem for problem in context.gather_objects(_problem(optimizer, chunks)) if problem]
    if found:
        raise ConfigError(found[0])


def _problem(optimizer: Any, chunks: Sequence[torch.nn.Module]) -> str:
    """Why ``optimizer`` cannot train the chunks; empty where it can."""
    if not isinstance(optimizer, (MegatronOptimizer, torch.optim.Optimizer)):
        is_scheduler = isinstance(optimizer, (OptimizerParamScheduler, torch.optim.lr_scheduler.LRScheduler))
        return f"optimizer is a {_kind(optimizer)}, {WANTED}" + (
            ": a schedule is given as scheduler=" if is_scheduler else ": leave it out, and one is made here"
        )
    return (
        _kind_problem(optimizer, chunks, ddp_config_of(chunks))
        or _foreign(optimizer, chunks)
        or _forgotten(optimizer, chunks)
    )


def _kind_problem(
    optimizer: MegatronOptimizer | torch.optim.Optimizer,
    chunks: Sequence[torch.nn.Module],
    ddp: DistributedDataParallelConfig | None,
) -> str:
    """What does not fit between the class of the optimizer and how the chunks are wrapped."""
    kind = _kind(optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        if isinstance(optimizer, torch.optim.LBFGS):
            return f"optimizer is an {kind}, which evaluates the loss several times a step: {WANTED}"
        apart = (not getattr(parameter, "allreduce", True) for chunk in chunks for parameter in chunk.parameters())
        if any(apart) or experts_reduced_as_dense(chunks):
            return (
                f"optimizer is a torch {kind}, but the experts' gradients are summed over other ranks than the rest, "
                f"so their norms need two optimizers: pass {MAKE_ONE}, which makes both"
            )
        if ddp is not None and ddp.use_distributed_optimizer:
            return (
                f"optimizer is a torch {kind}, but the chunks' DistributedDataParallel leaves each data-parallel rank "
                f"the gradient of its own share only (use_distributed_optimizer=True): pass {MAKE_ONE}, or wrap the "
                "chunks with use_distributed_optimizer=False"
            )
        return ""
    if ddp is None:
        return (
            "an optimizer was given with model chunks that are not wrapped in Megatron's "
            "DistributedDataParallel: wrap them, or leave the optimizer out"
        )
    for part in (part for part in parts_of(optimizer) if type(part) in PLAIN):
        if isinstance(part, DistributedOptimizer) != ddp.use_distributed_optimizer:
            return (
                f"optimizer is a {_kind(part)}, but the chunks' DistributedDataParallel has use_distributed_optimizer="
                f"{ddp.use_distributed_optimizer}: give OptimizerConfig and DistributedDataParallelConfig the same"
            )
        dtype = precision_of(chunks)
        if (dtype == torch.float16 and not part.config.fp16) or (
            dtype != torch.float32 and isinstance(part, FP32Optimizer)
        ):
            name = str(dtype).removeprefix("torch.")
            return (
                f"optimizer is a {_kind(part)} made for OptimizerConfig(bf16={part.config.bf16}, fp16="
                f"{part.config.fp16}), but the model chunks are in {name}: set the field of that precision"
            )
    return ""


def _foreign(optimizer: MegatronOptimizer | torch.optim.Optimizer, chunks: Sequence[torch.nn.Module]) -> str:
    own = {id(parameter) for chunk in chunks for parameter in chunk.parameters()}
    held = list(_parameters(optimizer))
    foreign = [parameter for parameter in held if id(parameter) not in own]
    if not foreign:
        return ""
    return (
        f"the optimizer ({_kind(optimizer)}) trains {len(foreign)} of its {len(held)} parameters outside the model "
        f"chunks, for example one of shape {list(foreign[0].shape)}: it was made for another model, or before the "
        f"chunks got their precision; make it from these chunks ({MAKE_ONE})"
    )


def _forgotten(optimizer: MegatronOptimizer | torch.optim.Optimizer, chunks: Sequence[torch.nn.Module]) -> str:
    if not _lists_all(optimizer):
        return ""
    held = {id(parameter) for parameter in _parameters(optimizer)}
    named = ((name, p) for chunk in chunks for name, p in chunk.named_parameters() if p.requires_grad)
    missing = [name for name, parameter in named if id(parameter) not in held]
    if not missing:
        return ""
    return (
        f"the optimizer ({_kind(optimizer)}) does not train {len(missing)} parameters of the model chunks, for example "
        f"{missing[0]}: make it from all chunks, or set requires_grad=False on what stays as it is"
    )


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The parts of a `ChainedOptimizer`; any other optimizer alone."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _parameters(optimizer: MegatronOptimizer | torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    """The model parameters that the optimizer trains, where its class makes them known."""
    if isinstance(optimizer, torch.optim.Optimizer):
        for group in optimizer.param_groups:
            yield from group["params"]
        return
    for part in parts_of(optimizer):
        if part.is_stub_optimizer or not _tells(part):
            continue
        if isinstance(part, DistributedOptimizer):
            for buffer in part.buffers:
                yield from buffer.params
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            for group in (*part.float16_groups, *part.fp32_from_fp32_groups):
                yield from group
        else:
            yield from part.get_parameters()


def _tells(part: MegatronOptimizer) -> bool:
    """Megatron-Core's optimizers for sharded models and of layers hold parameters of their own making."""
    if type(part) is DistributedOptimizer:
        return part.is_stub_optimizer or hasattr(part, "buffers")
    return type(part) in PLAIN


def _lists_all(optimizer: MegatronOptimizer | torch.optim.Optimizer) -> bool:
    if isinstance(optimizer, torch.optim.Optimizer):
        return True
    return type(optimizer) in (ChainedOptimizer, *PLAIN) and all(_tells(part) for part in parts_of(optimizer))


def _kind(value: Any) -> str:
    return type(value).__name__


def as_megatron(
    optimizer: MegatronOptimizer | torch.optim.Optimizer,
    chunks: Sequence[torch.nn.Module],
    context: ParallelContext,
    optimizer_config: OptimizerConfig,
) -> MegatronOptimizer:
    """A Megatron-Core optimizer as it is; a torch one in Megatron-Core's wrapper for its precision, which clips over
    the whole model and keeps fp32 copies of bf16 and fp16 weights. After `require_fitting`, with wrapped chunks.

    Args:
        optimizer_config: its ``clip_gradient`` holds for a torch optimizer.
    """
    if isinstance(optimizer, MegatronOptimizer):
        return optimizer
    for index, group in enumerate(optimizer.param_groups):
        # By these Megatron-Core finds a group again in a checkpoint (optimizer.py: param_group_identifier_keys); the
        # last one is nothing but a name there.
        names = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": index}
        group.update({key: value for key, value in names.items() if key not in group})
    config = MegatronOptimizerConfig(
        lr=optimizer.param_groups[0]["lr"],
        clip_grad=optimizer_config.clip_gradient,
        **precision_fields(precision_of(chunks)),
    )
    if config.params_dtype == torch.float32:
        wrapped: MegatronOptimizer = FP32Optimizer(optimizer, config, _no_state)
    else:
        scaler = _loss_scaler(config) if config.fp16 else None
        wrapped = Float16OptimizerWithFloat16Params(optimizer, config, scaler, _no_state)  # type: ignore[arg-type]
    wrapped.grad_stats_parallel_group = context.collection.mp
    wrapped.tp_group = context.tp_group
    return ChainedOptimizer([wrapped])


def _loss_scaler(config: MegatronOptimizerConfig) -> DynamicGradScaler:
    """As `get_megatron_optimizer` makes it."""
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=int(config.loss_scale_window),
        hysteresis=config.hysteresis,
    )


def _no_state(optimizer: torch.optim.Optimizer, config: MegatronOptimizerConfig | None = None) -> None:
    """State of a torch optimizer comes with its first step; `optimizer_state` fills it in for checkpoints."""
