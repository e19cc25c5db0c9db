"""Which linear layers of a Megatron chunk a LoRA target means: those of a dense layer, of latent attention, of each of
a rank's experts and of the shared expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from megatron_rl.config import ConfigError
from megatron_rl.engines.megatron.model.clamped_experts import TransposedLinear
from megatron_rl.engines.megatron.model.decoder_layers import DecoderLayer, decoder_layers
from megatron_rl.engines.megatron.model.model_chunk import unwrap
from megatron_rl.models.naming import chunk_prefix

# What Megatron-Core has in the place of linear_qkv where attention is latent.
LATENT = ("linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj")
LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", *LATENT)  # all that can have adapters
REPLICATED = ("linear_q_down_proj", "linear_kv_down_proj")
ROW_PARALLEL = ("linear_proj", "linear_fc2")


class AdaptedLayer(NamedTuple):
    """A layer that gets an adapter."""

    shard: str  # name of its weight, as layouts name it
    name: str  # in the whole model, the same on every layout: seeds the initial values
    parent: Any  # the module that has it
    target: str  # its name there
    tp_group: Any  # the ranks that its weight is cut over
    is_expert: bool = False  # of the routed ones: ranks have other tokens

    @property
    def module(self) -> nn.Module:
        found: nn.Module = getattr(self.parent, self.target)
        return found

    @property
    def weight(self) -> Tensor:
        """The rank's part: ``[out / tp, in]`` or ``[out, in / tp]``; ``[in, out]`` where `transposed`."""
        found: Tensor = self.module.weight  # type: ignore[assignment]
        return found

    @property
    def row_parallel(self) -> bool:
        """Its inputs are split over the ranks, not its outputs."""
        return self.target in ROW_PARALLEL

    @property
    def replicated(self) -> bool:
        """Every rank has all of it."""
        return self.target in REPLICATED or self.transposed

    @property
    def transposed(self) -> bool:
        """It multiplies from the right."""
        return isinstance(self.module, TransposedLinear)

    @property
    def gated(self) -> bool:
        """Its outputs are [gate; up], each split over the ranks."""
        return self.target == "linear_fc1" and bool(self.parent.config.gated_linear_unit) and not self.transposed


def adapted_layers(chunk: nn.Module, index: int, num_chunks: int, targets: Sequence[str]) -> Iterator[AdaptedLayer]:
    """The layers of a rank's ``index``-th chunk that ``targets`` means.

    Raises:
        ConfigError: a transformer layer has no such layer.
    """
    model = unwrap(chunk)
    for local, layer in enumerate(decoder_layers(model)):
        shards, names = f"{chunk_prefix(index, num_chunks)}decoder.layers.{local}.", f"decoder.layers.{layer.index}."
        for target in dict.fromkeys(targets):
            for within, own, parent, module, options in _within(layer, target, model.pg_collection.tp):
                _check(parent, module, target, f"layer {layer.index}")
                shard, name = f"{shards}{within}{module}.weight", f"{names}{own}{module}"
                yield AdaptedLayer(shard, name, parent, module, **options)


def _within(layer: DecoderLayer, target: str, tp_group: Any) -> Iterator[tuple[str, str, Any, str, dict[str, Any]]]:
    """(names on this rank, in the whole model, parent, module, where it stands) in one transformer layer."""
    dense = {"tp_group": tp_group}
    if target in ("linear_qkv", "linear_proj", *LATENT):
        attention = layer.attention.self_attention
        for module in _of_attention(attention, target):
            yield "self_attention.", "self_attention.", attention, module, dense
        return
    mlp = layer.feed_forward.mlp
    if not hasattr(mlp, "experts"):
        yield "mlp.", "mlp.", mlp, target, dense
    else:
        experts = mlp.experts
        for local, expert in enumerate(experts.local_experts):
            whole = f"mlp.experts.{mlp.local_expert_indices[local]}."
            options = {"tp_group": experts.tp_group, "is_expert": True}
            yield f"mlp.experts.local_experts.{local}.", whole, expert, target, options
        if mlp.shared_experts is not None:
            yield "mlp.shared_experts.", "mlp.shared_experts.", mlp.shared_experts, target, dense


def _of_attention(attention: nn.Module, target: str) -> list[str]:
    found = [name for name in LATENT if name in attention._modules]
    return found if target == "linear_qkv" and found else [target]


def _check(parent: nn.Module, module: str, target: str, where: str) -> None:
    layer = parent._modules.get(module)
    if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        raise ConfigError(
            f"lora.target_modules has {target}, but {where} has no such linear layer: its "
            f"{type(parent).__name__} has {', '.join(parent._modules)}"
        )


def check_experts(config: Any, targets: Sequence[str]) -> None:
    """Raise ConfigError on every rank, whichever layers it holds, for experts that cannot have adapters.

    Args:
        config: Megatron-Core's.
    """
    given = [target for target in targets if target in ("linear_fc1", "linear_fc2")]
    if not (config.num_moe_experts and given):
        return
    reasons = {
        "the experts of a rank are one grouped layer (moe_grouped_gemm): build them with moe_grouped_gemm=False": (
            config.moe_grouped_gemm
        ),
        f"experts are cut over etp={config.expert_tensor_parallel_size} ranks: set etp=1": (
            (config.expert_tensor_parallel_size or config.tensor_model_parallel_size) > 1
        ),
    }
    for reason in (reason for reason, is_so in reasons.items() if is_so):
        raise ConfigError(
            f"lora.target_modules has {' and '.join(given)}, and {reason}, or choose only linear_qkv and linear_proj"
        )
