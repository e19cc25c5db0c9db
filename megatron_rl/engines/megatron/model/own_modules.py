"""Modules of Megatron-Core with what some families add: biases of single layers, norms behind layers, scaled
embeddings, capped logits. Parameters keep Megatron's names."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_rl.engines.megatron.model.rms_norm import RMSNorm


class BiasedInputLinear(ColumnParallelLinear):
    """With a bias, whatever ``add_bias_linear`` says of the whole model."""

    def __init__(self, *sizes: int, bias: bool = True, **options: Any) -> None:
        super().__init__(*sizes, bias=True, **options)


class OutputLinear(RowParallelLinear):
    """With a bias, or a norm of its output, or both, whatever the whole model has.

    The norm is a forward hook, so that an adapter's hook, registered before it, adds to what the norm sees.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        biased: bool,
        normed: bool,
        **options: Any,
    ) -> None:
        super().__init__(input_size, output_size, config=config, bias=biased, **options)
        if normed:
            self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)
            self.register_forward_hook(_norm_output)


def _norm_output(layer: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> Any:
    value, bias = output
    return layer.post_layernorm(value if bias is None else value + bias), None  # type: ignore[operator]


class ScaledEmbedding(LanguageModelEmbedding):
    """Embeddings times ``scale``, which is rounded to their dtype first."""

    scale = 1.0

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        embeddings: Tensor = super().forward(*inputs, **options)
        return embeddings * torch.tensor(self.scale, dtype=embeddings.dtype, device=embeddings.device)


class CappedOutput(ColumnParallelLinear):
    """Logits become ``softcap * tanh(logit / softcap)``."""

    softcap = 0.0

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        logits, bias = super().forward(*inputs, **options)
        return torch.tanh(logits / self.softcap) * self.softcap, bias


def become(module: nn.Module, cls: type[nn.Module], **attributes: float) -> None:
    """Make ``module``, which `GPTModel` has built, one of a subclass that only computes something more."""
    assert issubclass(cls, type(module)), f"{cls.__name__} is no {type(module).__name__}"
    module.__class__ = cls
    for name, value in attributes.items():
        setattr(module, name, value)
