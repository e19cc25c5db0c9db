"""The optimizer of an FSDP2 engine and its learning-rate schedule, as `engines.megatron.optimizer` has them.

Torch's own AdamW or SGD over sharded fp32 parameters; weight decay leaves out biases and other vectors, as
Megatron-Core does (optimizer/__init__.py _get_param_groups).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedOptimizer:
    """Steps the sharded ``parameters`` of one model.

    Raises:
        ConfigError: a decay without its length.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        if config.decay != "constant" and not config.decay_steps:
            raise ConfigError(f"decay={config.decay} without decay_steps: give the number of optimizer steps it takes")
        self.config = config
        self.parameters = dict(parameters)
        decayed = [p for name, p in parameters.items() if p.dim() > 1 and not name.endswith(".bias")]
        chosen = {id(p) for p in decayed}
        rest = [p for p in parameters.values() if id(p) not in chosen]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        rate = learning_rate(config, 0)
        if config.optimizer == "sgd":
            self.inner: torch.optim.Optimizer = torch.optim.SGD(groups, lr=rate)
        else:
            betas = (config.beta1, config.beta2)
            self.inner = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.epsilon)

    @property
    def rate(self) -> float:
        """The learning rate that is set."""
        return float(self.inner.param_groups[0]["lr"])

    def set_rate(self, num_steps: int) -> None:
        """Set the rate of optimizer step ``num_steps``, counted from 1."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate(self.config, num_steps)

    def gradients(self) -> list[Tensor]:
        """Of the parameters that have one."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    def largest(self) -> float:
        """The largest magnitude in this rank's gradients; not finite where any is not."""
        local = [_local(gradient) for gradient in self.gradients()]
        local = [gradient for gradient in local if gradient.numel()]
        return float(torch.nn.utils.get_total_norm(local, norm_type=math.inf)) if local else 0.0

    def step(self, num_steps: int) -> float:
        """Clip, then step number ``num_steps``; returns the norm of all ranks' gradients before it. Collective."""
        gradients = self.gradients()
        norm = torch.nn.utils.get_total_norm(gradients)
        total = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.config.clip_gradient > 0:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.clip_gradient, total)
        self.set_rate(num_steps)
        self.inner.step()
        return float(total)

    # Checkpoints

    def state(self) -> dict[str, Tensor]:
        """Moments by ``moment.parameter``; zeros before the first step."""
        if self.config.optimizer == "sgd":
            return {}
        found = {}
        for name, parameter in self.parameters.items():
            kept = self.inner.state.get(parameter, {})
            for moment in MOMENTS:
                found[f"{moment}.{name}"] = kept[moment] if moment in kept else torch.zeros_like(parameter.detach())
        return found

    def load_state(self, state: Mapping[str, Any], num_steps: int) -> None:
        """Restore local moments by the same names; a rank without rows of a parameter has none of it."""
        if self.config.optimizer == "sgd" or not num_steps:
            return
        for name, parameter in self.parameters.items():
            moments: dict[str, Tensor] = {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
            for moment, target in moments.items():
                if (loaded := state.get(f"{moment}.{name}")) is not None:
                    _local(target).copy_(loaded)
            self.inner.state[parameter] = {"step": torch.tensor(float(num_steps)), **moments}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def learning_rate(config: OptimizerConfig, num_steps: int) -> float:
    """The rate after ``num_steps`` steps of the schedule (megatron.core OptimizerParamScheduler.get_lr, from 0)."""
    peak, least, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if warmup > 0 and num_steps <= warmup:
        return peak * num_steps / warmup
    if config.decay == "constant":
        return peak
    length = max(config.decay_steps, warmup + 1)
    if num_steps > length:
        return least
    share = (num_steps - warmup) / (length - warmup)
    left = 1 - share if config.decay == "linear" else 0.5 * (math.cos(math.pi * share) + 1)
    return least + left * (peak - least)
