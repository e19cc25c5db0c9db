"""`ModelDescription`: a decoder, layer by layer, composed of components.

Layouts, the Megatron builder, the Hugging Face folders and the local rollout engine all read it, and nothing else says
what a model computes. A family composes it (`models/family.py`); `describe` finds the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from megatron_rl.config import ConfigError
from megatron_rl.models.components.attention import GroupedQueryAttention
from megatron_rl.models.components.embedding import Embedding, OutputLayer, ValueOutput
from megatron_rl.models.components.experts import ExpertMLP
from megatron_rl.models.components.mla import LatentAttention
from megatron_rl.models.components.mlp import DenseMLP
from megatron_rl.models.components.norm import Norm
from megatron_rl.models.parameters import Parameter
from megatron_rl.reshard.layout import Recomputed

T = TypeVar("T")


@dataclass(frozen=True)
class LayerDescription:
    """``x += attention(attention_norm(x))``, then ``x += mlp(mlp_norm(x))``; each output through a post norm first,
    where there is one."""

    attention_norm: Norm
    attention: GroupedQueryAttention | LatentAttention
    mlp_norm: Norm
    mlp: DenseMLP | ExpertMLP
    recomputed: tuple[Recomputed, ...] = ()  # what SGLang computes from its shards; names lack the layer's prefix
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """In the order of the forward pass; names lack the layer's prefix."""
        return (
            self.attention_norm.parameter("input_layernorm.weight", self.attention.fused_norm),
            *self.attention.parameters(),
            *_behind(self.attention_post_norm, "self_attention.linear_proj"),
            self.mlp_norm.parameter("pre_mlp_layernorm.weight", self.mlp.fused_norm),
            *self.mlp.parameters(),
            *_behind(self.mlp_post_norm, "mlp.linear_fc2"),
        )


def _behind(norm: Norm | None, linear: str) -> tuple[Parameter, ...]:
    """A norm of the output of a linear layer of Megatron's, to which it belongs there."""
    return () if norm is None else (norm.parameter(f"{linear}.post_layernorm.weight"),)


@dataclass(frozen=True)
class ModelDescription:
    """A whole decoder."""

    family: str
    embedding: Embedding
    layers: tuple[LayerDescription, ...]
    final_norm: Norm
    output: OutputLayer | ValueOutput
    layers_prefix: str = "model.layers."
    final_recomputed: tuple[Recomputed, ...] = ()  # what SGLang computes from shards that are in no layer

    @property
    def tied(self) -> bool:
        """The output layer is the embedding."""
        return self.output.hf == self.embedding.hf

    def prefix(self, index: int) -> str:
        """What the names of a layer's logical tensors begin with."""
        return f"{self.layers_prefix}{index}."

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter with the prefix of its logical names, in the order of the forward pass."""
        yield "", self.embedding.parameter()
        for index, layer in enumerate(self.layers):
            for parameter in layer.parameters:
                yield self.prefix(index), parameter
        yield "", self.final_norm_parameter
        if not self.tied:
            yield "", self.output.parameter()

    @property
    def final_norm_parameter(self) -> Parameter:
        return self.final_norm.parameter("decoder.final_layernorm.weight")

    @property
    def mixes(self) -> bool:
        """Some layers have experts."""
        return any(isinstance(layer.mlp, ExpertMLP) for layer in self.layers)

    def shared(self, read: Callable[[LayerDescription], T], what: str) -> T:
        """What ``read`` returns, which must be the same for every layer.

        Raises:
            ConfigError: layers differ in it.
        """
        values = list(dict.fromkeys(map(read, self.layers)))
        if len(values) > 1:
            raise ConfigError(f"the layers of this {self.family} model differ in {what}: {values}; expected one value")
        return values[0]
