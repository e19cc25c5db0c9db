"""Making plain torch optimizers fit Megatron-Core's distributed checkpoints.

Without TransformerEngine and apex Megatron-Core falls back to ``torch.optim.AdamW``, which differs in two ways that
`DistributedOptimizer` (megatron.core 0.16.1, distrib_optimizer.py) does not allow for: it has no state before its first
step, where ``state_dict`` expects one, and it keeps a ``step`` tensor for each parameter, which the reshardable format
stores once for all but looks up for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def prepare_for_checkpoint(optimizer: MegatronOptimizer) -> None:
    """Allocate the state of every torch AdamW inside, and let its loading pass over the stored-once ``step``."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Adam):  # AdamW is a subclass
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = _setter(part)


def finish_loading(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a ``step`` of its own: `DistributedOptimizer.load_state_dict` lets all of them share one
    tensor, which AdamW would then count up once for each parameter."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()


def _setter(optimizer: DistributedOptimizer) -> Callable[[Tensor, Mapping[str, Any]], None]:
    """As `DistributedOptimizer._set_main_param_and_optimizer_states`, for the keys that the checkpoint has."""

    def set_states(model_param: Tensor, tensors: Mapping[str, Any]) -> None:
        group, place = optimizer.model_param_group_index_map[model_param]
        main = optimizer.optimizer.param_groups[group]["params"][place]
        for key, destination in {"param": main, **optimizer.optimizer.state[main]}.items():
            if key in tensors:
                destination.copy_(tensors[key])

    return set_states
