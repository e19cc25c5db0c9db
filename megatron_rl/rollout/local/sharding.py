"""`TensorParallel`: the three collectives of a tensor-parallel decoder; with one rank they do nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """The ranks that hold one copy of the rollout weights together."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def over(cls, group: dist.ProcessGroup | None) -> TensorParallel:
        """The ranks of ``group``; None = this rank alone."""
        if group is None:
            return cls()
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(partial, group=self.group)
        return partial

    def gather_columns(self, local: torch.Tensor) -> torch.Tensor:
        """``[rows, columns]`` of each rank beside one another, in rank order."""
        if self.size == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def agree(self, value: torch.Tensor) -> torch.Tensor:
        """The first rank's value on every rank, in place. Ranks that disagreed on one sampled token, for the last bit
        of a reduction, would fill one KV cache with two texts."""
        if self.size > 1:
            dist.broadcast(value, group_src=0, group=self.group)
        return value
