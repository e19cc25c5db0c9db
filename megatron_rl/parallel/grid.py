"""Where each rank stands: sizes of the parallel axes, and the coordinate of every rank, without any process group.

The rank order is Megatron-Core's default, ``tp-cp-ep-dp-pp`` (`parallel_state.RankGenerator`): tensor parallel ranks
are neighbours, pipeline stages are farthest apart. Experts have their own grid over the same ranks: etp, ep, edp, pp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field

from megatron_rl.config import ConfigError, ConfigRecord


class ParallelSizes(ConfigRecord):
    """Sizes of the parallel axes of one model; data parallelism takes the ranks that remain."""

    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks."""
    pp: int = Field(default=1, ge=1)
    """Pipeline stages."""
    vpp: int = Field(default=1, ge=1)
    """Model chunks per pipeline stage (virtual pipeline); 1 switches interleaving off."""
    cp: int = Field(default=1, ge=1)
    """Context-parallel ranks: each sequence is split over them."""
    ep: int = Field(default=1, ge=1)
    """Expert-parallel ranks (MoE only)."""
    etp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks inside each expert (MoE only)."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel ranks."""
    rollout_ranks: int = Field(default=0, ge=0)
    """Ranks that hold no training shards and only generate: the last ones of the job, beside the ranks of the axes
    above. 0 = training ranks generate themselves."""

    @property
    def of_training(self) -> ParallelSizes:
        """The axes of the training ranks alone."""
        return self.model_copy(update={"rollout_ranks": 0})

    def num_training(self, world_size: int) -> int:
        """Training ranks among the ``world_size`` that torchrun started.

        Raises:
            ConfigError: none are left.
        """
        if self.rollout_ranks >= world_size:
            raise ConfigError(
                f"parallel.rollout_ranks={self.rollout_ranks} of {world_size} ranks leaves none for training: start "
                "more, or lower it"
            )
        return world_size - self.rollout_ranks

    def dp(self, world_size: int) -> int:
        """Data-parallel ranks among ``world_size`` training ranks.

        Raises:
            ConfigError: the sizes do not divide the world.
        """
        model = self.tp * self.pp * self.cp
        if world_size % model:
            raise ConfigError(
                f"tp={self.tp} * pp={self.pp} * cp={self.cp} = {model} ranks for one replica of the model, but "
                f"{self._started(world_size, model)}, or lower one of them"
            )
        experts = self.etp * self.ep * self.pp
        if world_size % experts:
            raise ConfigError(
                f"etp={self.etp} * ep={self.ep} * pp={self.pp} = {experts} ranks for one replica of the experts, but "
                f"{self._started(world_size, experts)}, or lower one of them"
            )
        return world_size // model

    @property
    def smallest_world(self) -> int:
        """The fewest ranks that the sizes fit."""
        return math.lcm(self.tp * self.pp * self.cp, self.etp * self.ep * self.pp)

    def _started(self, num_training: int, replica: int) -> str:
        if not self.rollout_ranks:
            return f"torchrun started {num_training}: start a multiple of {replica}"
        return (
            f"parallel.rollout_ranks={self.rollout_ranks} leaves {num_training} of the "
            f"{num_training + self.rollout_ranks} that torchrun started for training: start a multiple of {replica} "
            f"and {self.rollout_ranks} more"
        )

    def __str__(self) -> str:
        shown = [(n, getattr(self, n)) for n in ("tp", "pp", "vpp", "cp", "ep", "etp") if getattr(self, n) > 1]
        text = " x ".join(f"{name.upper()}{size}" for name, size in shown) or "one rank a replica"
        return text + (" + SP" if self.sequence_parallel else "")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank stands on each axis."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class RankGrid:
    """Coordinates of all ranks, as a pure function of sizes and world size."""

    sizes: ParallelSizes
    world_size: int

    def __post_init__(self) -> None:
        self.sizes.dp(self.world_size)

    @property
    def dp(self) -> int:
        return self.sizes.dp(self.world_size)

    def coordinates(self, rank: int) -> Coordinates:
        sizes, stage_ranks = self.sizes, self.world_size // self.sizes.pp
        pp, inside = divmod(rank, stage_ranks)
        rest, tp = divmod(inside, sizes.tp)
        dp, cp = divmod(rest, sizes.cp)
        rest, etp = divmod(inside, sizes.etp)
        edp, ep = divmod(rest, sizes.ep)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, edp=edp)

    def ranks(self, **fixed: int) -> tuple[int, ...]:
        """All ranks whose coordinates have the given values, ascending: ``grid.ranks(dp=0, pp=1)``."""
        places = ((rank, self.coordinates(rank)) for rank in range(self.world_size))
        return tuple(r for r, place in places if all(getattr(place, axis) == value for axis, value in fixed.items()))

    def partition(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """The disjoint sets of ranks that agree on ``axes``: ``partition("dp")`` is one set for each replica."""
        sets: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank)
            sets.setdefault(tuple(getattr(place, axis) for axis in axes), []).append(rank)
        return tuple(tuple(ranks) for _, ranks in sorted(sets.items()))
