"""Where FSDP2 puts a module's tensors: each parameter cut by its first dim as ``torch.chunk`` cuts, buffers whole.

A pure function of shapes and the number of ranks, so every rank knows every other's part; `check_placements` compares
it with the DTensors that there are.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from megatron_rl.models.module_architecture import ModuleTensor, held_of
from megatron_rl.reshard import Layout
from megatron_rl.reshard import Shard as LocalShard


def row_block(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """``[start, stop)`` of the first dim that ``rank`` holds: full blocks first, the last ones may be empty."""
    size = -(-rows // world_size)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def fsdp2_layout(tensors: Sequence[ModuleTensor], world_size: int) -> Layout:
    """Each rank is a replica group of its own, except for buffers, which all hold."""

    emit = _Rows(tuple(tensors), world_size)
    return Layout(f"fsdp2 DP{world_size}", {rank: rank for rank in range(world_size)}, emit, held=held_of(tensors))


@dataclass(frozen=True)
class _Rows:
    """Rank -> shards."""

    tensors: tuple[ModuleTensor, ...]
    world_size: int

    def __call__(self, rank: Hashable) -> list[LocalShard]:
        assert isinstance(rank, int)
        return [local_shard(tensor, rank, self.world_size) for tensor in self.tensors]


def local_shard(tensor: ModuleTensor, rank: int, world_size: int) -> LocalShard:
    """What a rank holds of a tensor."""
    if not tensor.trained:
        return tensor.shard
    return tensor.rows(*row_block(tensor.shard.shape[0], rank, world_size))


def check_placements(parameters: Mapping[str, Tensor], layout: Layout, rank: int) -> None:
    """Check that the sharded ``parameters`` of this rank are what ``layout`` says."""
    shapes = {shard.name: shard.shape for shard in layout.shards(rank)}
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        assert tuple(parameter.placements) == (Shard(0),), f"{name} is placed as {parameter.placements}"
        local = tuple(parameter.to_local().shape)
        assert local == shapes.get(name, local), f"{name}: {local} here, {shapes[name]} in the layout"
