"""One rank's part of a whole model's parameters, by Megatron's own partition attributes.

Independent of the package's layouts, which it helps to check.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_rl.engines.megatron.model.model_chunk import layer_indices

from megatron.core import parallel_state as ps  # isort: skip  (after megatron_rl, which gives it its CPU face)


def full_name(chunk: nn.Module, name: str, known: Mapping[str, Tensor] | None = None) -> str:
    """The parameter's name in a model of one rank: global layer and expert numbers, a tied output is the embedding."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(layer_indices(chunk)[int(parts[2])])
    if "local_experts" in parts:
        index = parts.index("local_experts") + 1
        local = chunk.config.num_moe_experts // ps.get_expert_model_parallel_world_size()
        parts[index] = str(int(parts[index]) + local * ps.get_expert_model_parallel_rank())
    whole = ".".join(parts)
    if known is not None and whole == "output_layer.weight" and whole not in known:
        return "embedding.word_embeddings.weight"
    return whole


def shard_of(full: Mapping[str, Tensor], chunk: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """What ``parameter`` holds of the whole tensors ``full``."""
    whole_name = full_name(chunk, name, full)
    tensor = full[whole_name]
    if not getattr(parameter, "tensor_model_parallel", False):
        return tensor
    dim = parameter.partition_dim
    if ".experts." in whole_name:  # shared experts are cut as dense layers are
        size, rank = ps.get_expert_tensor_parallel_world_size(), ps.get_expert_tensor_parallel_rank()
    else:
        size, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
    if whole_name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensor = F.pad(tensor, (0, 0, 0, parameter.shape[0] * size - tensor.shape[0]))  # rows of the padded vocabulary
    # linear_fc1 holds [gate; up], and every rank a part of each.
    halves = tensor.chunk(2, dim) if "linear_fc1" in whole_name else [tensor]
    return torch.cat([half.chunk(size, dim)[rank] for half in halves], dim)
