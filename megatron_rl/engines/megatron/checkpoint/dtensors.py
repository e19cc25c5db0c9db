"""DTensors in a state, as the sharded tensors of Megatron-Core's checkpoints.

Both describe a rectangle of a whole tensor. A rank that holds nothing of one stores nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

SEPARATOR = "/"  # between the keys of a state in a tensor's name


def with_sharded_tensors(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """``state`` with each DTensor described for Megatron-Core, named by its place; those without rows here left out."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        here = (*path, str(key))
        if isinstance(value, DTensor):
            if value.to_local().numel():
                found[key] = _sharded(SEPARATOR.join(here), value)
        elif type(value) is dict:
            found[key] = with_sharded_tensors(value, here)
        else:
            found[key] = value
    return found


def _sharded(name: str, tensor: DTensor) -> ShardedTensor:
    local = tensor.to_local().detach()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return ShardedTensor(
        key=name,
        data=local,
        dtype=local.dtype,
        local_shape=tuple(local.shape),
        global_shape=tuple(tensor.shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,  # rows need not be cut into equal blocks
    )
