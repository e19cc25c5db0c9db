"""Mixtral: Mistral's attention, and experts in every layer under names of their own; their weights sum to 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from megatron_rl.models.families.mistral import Mistral
from megatron_rl.models.family import FAMILIES
from megatron_rl.models.routed_experts import ExpertNames


@FAMILIES.register("mixtral")
class Mixtral(Mistral):
    """Routed experts of the feed-forward size."""

    expert_keys: ClassVar[Mapping[str, str]] = {
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "ffn": "intermediate_size",
    }
    expert_names = ExpertNames(
        experts="block_sparse_moe.experts.",
        gate="w1",
        up="w3",
        down="w2",
        router="block_sparse_moe.gate.weight",
        module="mlp.experts.",
        module_router="mlp.gate.weight",
    )
