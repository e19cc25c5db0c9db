"""Making plain torch optimizers fit Megatron-Core's distributed checkpoints.

Without TransformerEngine and apex Megatron-Core falls back to ``torch.optim.AdamW``, which differs in two ways that
`DistributedOptimizer` (megatron.core 0.16.1, distrib_optimizer.py) does not allow for: it has no state before its first
step, where ``state_dict`` expects one, and it keeps a ``step`` tensor for each parameter, which the reshardable format
stores once for all but looks up for each.
"""

from __future__ import annotations

import collections
import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_rl.config import ConfigError

logger = logging.getLogger(__name__)

SETTINGS = {  # keys of schedules and of parameter groups -> fields of `OptimizerConfig`
    "max_lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "lr_warmup_steps": "warmup_steps",
    "lr_decay_steps": "decay_steps",
    "lr_decay_style": "decay",
    "start_wd": "weight_decay",
    "betas": "beta1, beta2",
    "eps": "epsilon",
}


def prepare_for_checkpoint(optimizer: MegatronOptimizer, loading: bool = False) -> None:
    """Allocate the state of every torch AdamW inside, and let its loading pass over the stored-once ``step``. To load
    into, every other torch optimizer gets the state that its first step would make.

    Raises:
        ConfigError: an optimizer keeps state that no checkpoint of Megatron-Core can hold.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if isinstance(inner, torch.optim.Adam):  # AdamW is a subclass
            _allocate(inner)
            if isinstance(part, DistributedOptimizer):
                part._set_main_param_and_optimizer_states = _setter(part)
        elif isinstance(inner, torch.optim.Optimizer):
            if loading:
                _make_first_state(inner)
            _require_storable(inner)
            if part.init_state_fn is None:  # Megatron-Core's for SGD, which it calls all the same
                part.init_state_fn = lambda *_: None


def _allocate(inner: torch.optim.Adam) -> None:
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
                if group.get("amsgrad"):
                    inner.state[parameter]["max_exp_avg_sq"] = torch.zeros_like(parameter)


def _make_first_state(inner: torch.optim.Optimizer) -> None:
    """By a step of a copy of the optimizer on copies of its parameters; what it computes is overwritten by loading."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            if inner.state.get(parameter):
                continue
            trial, stand_in = copy.copy(inner), parameter.detach().clone()
            stand_in.grad = torch.zeros_like(stand_in)
            trial.param_groups, trial.state = [{**group, "params": [stand_in]}], collections.defaultdict(dict)
            trial.step()
            if trial.state.get(stand_in):
                inner.state[parameter] = trial.state[stand_in]


def _require_storable(inner: torch.optim.Optimizer) -> None:
    for parameter, state in inner.state.items():
        for key, value in state.items():
            if key != "step" and not (isinstance(value, Tensor) and value.shape == parameter.shape):
                raise ConfigError(
                    f"the optimizer {type(inner).__name__} keeps {key!r}, which does not have its parameter's shape "
                    f"({list(parameter.shape)}): Megatron-Core's checkpoints cannot hold it; set trainer.save_every=0 "
                    "and save_at_end=false, or pass another optimizer"
                )


def load_optimizer(
    name: str,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler | None,
    state: Any,
    schedule: Mapping[str, Any],
) -> None:
    """Restore what a checkpoint holds of an optimizer and of its schedule.

    Moments and counts are the checkpoint's. Learning rates, decay, betas and so on are those of this run where its
    schedule is made to go before the checkpoint (Megatron-Core's ``override_opt_param_scheduler``, as ours are); what
    that changes is logged.
    """
    own = [{key: group[key] for key in SETTINGS if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(with_state(state))
    finish_loading(optimizer)
    if scheduler is None:
        return
    changed: dict[str, str] = {}
    if scheduler.override_opt_param_scheduler:
        for group, settings in zip(optimizer.param_groups, own, strict=True):
            changed |= _differences({key: group.get(key) for key in settings}, settings)
            group.update(settings)
        changed |= _differences(schedule, scheduler.state_dict())
    scheduler.load_state_dict(dict(schedule))
    if changed:
        logger.warning(
            "%s: %s, as this run's configuration says; weights, moments and step are the checkpoint's",
            name,
            ", ".join(changed.values()),
        )


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    constant = given.get("lr_decay_style") == "constant"
    return {
        key: f"{field} {stored[key]} -> {given[key]}"
        for key, field in SETTINGS.items()
        if key in stored and key in given and stored[key] != given[key] and not (constant and key == "lr_decay_steps")
    }


def finish_loading(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a ``step`` of its own: `DistributedOptimizer.load_state_dict` lets all of them share one
    tensor, which AdamW would then count up once for each parameter."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in () if part.optimizer is None else part.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()


def with_state(loaded: Any) -> Any:
    """A loaded optimizer state with the entry that a checkpoint leaves out where it is empty (plain SGD)."""
    if "param_groups" in loaded:
        return {"state": {}, **loaded}
    return {key: with_state(part) if isinstance(part, dict) else part for key, part in loaded.items()}


def _setter(optimizer: DistributedOptimizer) -> Callable[[Tensor, Mapping[str, Any]], None]:
    """As `DistributedOptimizer._set_main_param_and_optimizer_states`, for the keys that the checkpoint has."""

    def set_states(model_param: Tensor, tensors: Mapping[str, Any]) -> None:
        group, place = optimizer.model_param_group_index_map[model_param]
        main = optimizer.optimizer.param_groups[group]["params"][place]
        for key, destination in {"param": main, **optimizer.optimizer.state[main]}.items():
            if key in tensors:
                destination.copy_(tensors[key])

    return set_states
