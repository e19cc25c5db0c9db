"""Refreshing the fp32 copies that Megatron-Core's optimizers keep of bf16 and fp16 weights.

A checkpoint that is loaded into the model alone is undone by the next step, which starts from the copies. Megatron-LM
calls ``reload_model_params`` after such a load; after an ordinary step that would round the copies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def follow_weights(optimizer: MegatronOptimizer) -> int:
    """Overwrite each fp32 copy whose rounded value is not the weight: the weight was written by something else.

    Returns:
        How many copies on this rank were changed.
    """
    changed = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for weight, main in _pairs(part):
            if not torch.equal(weight, main.to(weight.dtype)):
                main.copy_(weight)
                changed += 1
    return changed


def _pairs(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights, or this rank's shards of them, beside their copies; both flat."""
    if part.is_stub_optimizer or part.config.use_precision_aware_optimizer:
        return
    if isinstance(part, Float16OptimizerWithFloat16Params):
        groups, mains = part.float16_groups, part.fp32_from_float16_groups
    elif isinstance(part, DistributedOptimizer) and hasattr(part, "buffers"):
        groups, mains = part.model_float16_groups, part.shard_fp32_from_float16_groups
    else:
        return
    for group, copies in zip(groups, mains, strict=True):
        for parameter, main in zip(group, copies, strict=True):
            if main is None or parameter.dtype not in HALF:
                continue
            flat = parameter.detach().view(-1)
            if isinstance(part, DistributedOptimizer):
                own = part._get_model_param_range_map(parameter)["param"]
                flat = flat[own.start : own.end]
            yield flat, main.detach().view(-1)
