"""Low-rank adapters on the linear layers of a module under FSDP2.

    y = x W^T + factor * (x A^T) B^T          A: [rank, in], B: [out, rank]      (Hu et al. 2021, arXiv:2106.09685)

A and B are parameters of the layer that they adapt, so that FSDP2 gathers them with it. B is cut by rows as W is: a
rank merges its rows with its own of B and all of A, which is small and gathered once for each push.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import LoraConfig
from megatron_rl.models.lora_update import first_values, merged
from megatron_rl.models.peft_adapters import PeftAdapters, Update

CHILD = "lora"  # the adapter's name in its layer

# Megatron-Core's name of a layer -> the names that modules of `transformers` give to it or to its parts.
LAYERS = {
    "linear_qkv": "q_proj k_proj v_proj qkv_proj query_key_value Wqkv q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj "
    "in_proj_qkvz in_proj_qkv",
    "linear_proj": "o_proj out_proj dense",
    "linear_fc1": "gate_proj up_proj gate_up_proj fc1 c_fc dense_h_to_4h",
    "linear_fc2": "down_proj fc2 c_proj dense_4h_to_h",
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "linear_kv_up_proj": "kv_b_proj",
}


class LoraAdapter(nn.Module):
    """The update of one linear layer; a child of it.

    Args:
        start: A and B at first.
        factor: alpha / rank.
    """

    row_parallel = False  # see `engines.base.LowRank`

    def __init__(self, start: Update, factor: float, dropout: float) -> None:
        super().__init__()
        self.factor, self.dropout, self.enabled = factor, dropout, True
        self.weight_a, self.weight_b = (nn.Parameter(matrix.float()) for matrix in start)
        self._whole_a: Tensor = self.weight_a.detach()

    def forward(self, x: Tensor) -> Tensor:
        """The update of the layer's output."""
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x
        return F.linear(F.linear(dropped, self.weight_a) * self.factor, self.weight_b)

    def gather(self) -> None:
        """Bring all of A to this rank. Collective."""
        held: Any = self.weight_a.detach()
        self._whole_a = held.full_tensor() if isinstance(held, DTensor) else held

    @property
    def a(self) -> Tensor:
        """``[rank, in]`` as it was when it was gathered."""
        return self._whole_a

    @property
    def b(self) -> Tensor:
        """This rank's rows."""
        held: Any = self.weight_b.detach()
        return held.to_local() if isinstance(held, DTensor) else held

    def merged(self, weight: Tensor) -> Tensor:
        """This rank's rows of the layer's weight with the update in them."""
        return merged(weight, self.a, self.b, self.factor)

    def matrices(self, tensor: str | None = None) -> tuple[Tensor, Tensor, float]:
        """See `engines.base.LowRank`."""
        return self.a, self.b, self.factor


def add_adapters(
    module: nn.Module, layers: Sequence[nn.Module], config: LoraConfig, seed: int, given: PeftAdapters | None = None
) -> dict[str, LoraAdapter]:
    """Freeze ``module`` and give the linear layers that ``config`` names, inside of ``layers``, an adapter each.

    Args:
        given: the adapters to start from, which also say where there are some.

    Returns:
        The adapters by the name of the weight in the module.

    Raises:
        ConfigError: there is no such layer, or experts are among what was asked for.
    """
    module.requires_grad_(False)
    inside = {id(part) for layer in layers for part in layer.modules()}
    linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear) and id(part) in inside}
    if given is None:
        _refuse_experts(module, inside, config)
        adapters = _fresh(module, linear, config, seed)
    else:
        adapters = _given(linear, config, given)
    for name, adapter in adapters.items():
        layer = linear[name]
        layer.add_module(CHILD, adapter)
        layer.forward = functools.partial(_adapted, layer, adapter)  # type: ignore[method-assign]
    return {f"{name}.weight": adapter for name, adapter in adapters.items()}


def _fresh(module: nn.Module, linear: Mapping[str, nn.Linear], config: LoraConfig, seed: int) -> dict[str, LoraAdapter]:
    chosen = {name for target in config.target_modules for name in LAYERS[target].split()}
    found = {}
    for name, layer in linear.items():
        if name.rpartition(".")[2] in chosen:
            a = first_values(name, config.rank, layer.in_features, seed)
            start = Update(a, torch.zeros(layer.out_features, config.rank))
            found[name] = LoraAdapter(start, config.alpha / config.rank, config.dropout_after())
    if not found:
        names = sorted({name.rpartition(".")[2] for name, p in module.named_modules() if isinstance(p, nn.Linear)})
        raise ConfigError(
            f"lora.target_modules={list(config.target_modules)} names no linear layer of {type(module).__name__}; its "
            f"linear layers are called {', '.join(names) or 'nothing: it has none'}"
        )
    return found


def _given(linear: Mapping[str, nn.Linear], config: LoraConfig, given: PeftAdapters) -> dict[str, LoraAdapter]:
    """Adapters of a PEFT folder, whose layers are linear layers of the module."""
    found = {}
    dropout = config.dropout_after(given.config.dropout)
    for tensor in given.tensors:
        entry, name = given.entry(tensor), given.places[tensor].parameter.removesuffix(".weight")
        if entry is None or name not in linear:
            raise ConfigError(
                f"{given.path} has adapters of {tensor}, which can have none under FSDP2: only linear layers inside of "
                "the model's layers can, no experts; use backend: megatron where the model has a family"
            )
        found[name] = LoraAdapter(given.read(tensor), entry.factor, dropout)
    return found


def _refuse_experts(module: nn.Module, inside: Collection[int], config: LoraConfig) -> None:
    given = [target for target in config.target_modules if target in ("linear_fc1", "linear_fc2")]
    parts = [(name, p) for name, p in module.named_modules() if id(p) in inside and not isinstance(p, nn.Conv1d)]
    stacked = [f"{name}.{own}" for name, p in parts for own, w in p.named_parameters(recurse=False) if w.dim() == 3]
    if given and stacked:
        raise ConfigError(
            f"lora.target_modules has {' and '.join(given)}, but {type(module).__name__} stacks experts in parameters "
            f"such as {stacked[0]}, which take no adapters under FSDP2: choose linear_qkv and linear_proj, or "
            "backend: megatron where the model has a family"
        )


def _adapted(layer: nn.Linear, adapter: LoraAdapter, x: Tensor) -> Tensor:
    found = F.linear(x, layer.weight, layer.bias)
    return found + adapter(x) if adapter.enabled else found
