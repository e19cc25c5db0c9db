"""`keep_no_routes`: layers of experts hold no tensor of their last tokens.

Megatron-Core's token dispatchers keep the probabilities of the last tokens as attributes (megatron.core
`MoEAlltoAllTokenDispatcher.dispatch_preprocess`), and those the autograd graph up to the parameters, whose hooks refer
to the model: a cycle through C++, which Python cannot collect. A dropped model would keep its memory and groups.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn


def keep_no_routes(chunk: nn.Module) -> None:
    """Let each layer of experts in ``chunk`` drop what has a graph when its forward pass has ended; none reads it
    after."""
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            module.register_forward_hook(_drop)


def _drop(layer: MoELayer, _inputs: object, _output: object) -> None:
    kept = vars(layer.token_dispatcher)
    for name, value in kept.items():
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            kept[name] = None
