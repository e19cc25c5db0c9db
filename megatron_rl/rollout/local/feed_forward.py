"""The feed-forward part of a layer on one rank: a `DenseLayer`, or an `ExpertLayer`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from megatron_rl.models.activations import ACTIVATIONS
from megatron_rl.models.components.experts import ExpertMLP
from megatron_rl.models.components.mlp import DenseMLP
from megatron_rl.rollout.local.expert_layer import ExpertBiases, ExpertLayer, SharedExpert
from megatron_rl.rollout.local.heads import Named
from megatron_rl.rollout.local.sharding import TensorParallel


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A gated feed-forward layer on this rank, without the bias of its output."""

    gate_up: torch.Tensor
    down: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor] = F.silu
    bias: torch.Tensor | None = None  # of gate_up

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(normed, self.gate_up, self.bias).chunk(2, -1)
        return F.linear(self.activation(gate).mul_(up), self.down)


def feed_forward(
    described: DenseMLP | ExpertMLP, named: Named, prefix: str, tp: TensorParallel
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``[tokens, hidden]`` -> this rank's part of the output; ``prefix`` precedes the names of the layer."""
    if isinstance(described, DenseMLP):
        bias = named(prefix + "mlp.gate_up_proj.bias") if described.bias else None
        return replace(_dense(named, prefix + "mlp."), activation=ACTIVATIONS[described.activation], bias=bias)
    names, experts = described.names, described.experts
    shared = None
    if experts.shared_ffn:
        gate = named(prefix + names.shared_gate) if experts.shared_gate else None
        shared = SharedExpert(_dense(named, prefix + names.shared), gate)
    return ExpertLayer(
        experts,
        gate=named(prefix + names.router),
        w13=named(f"{prefix}{names.experts}w13_weight"),
        w2=named(f"{prefix}{names.experts}w2_weight"),
        tp=tp,
        correction=named(prefix + names.correction_bias) if experts.correction_bias else None,
        shared=shared,
        biases=_biases(named, prefix, names.experts) if experts.biased else None,
    )


def _biases(named: Named, prefix: str, experts: str) -> ExpertBiases:
    w13, w2 = (named(f"{prefix}{experts}{name}_weight_bias") for name in ("w13", "w2"))
    return ExpertBiases(named(prefix + "mlp.router.bias"), w13, w2)


def _dense(named: Named, prefix: str) -> DenseLayer:
    return DenseLayer(named(prefix + "gate_up_proj.weight"), named(prefix + "down_proj.weight"))
