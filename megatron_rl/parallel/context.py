"""`ParallelContext`: where this rank stands in one model, and the process groups of that model.

It is injected from what a Megatron job already has (`from_parallel_state`, `from_process_groups`) or made from sizes
(`create`). Everything above receives it through constructors; nothing above reads `parallel_state`.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state as megatron_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.parallel.agreement import Agreement, Attempt, GroupPeers
from megatron_rl.parallel.grid import Coordinates, ParallelSizes, RankGrid
from megatron_rl.parallel.groups import end_groups, gather_objects, objects_on_first, own_group, ranks_of
from megatron_rl.parallel.worlds import SplitWorld

T = TypeVar("T")
Axis = Literal["tp", "pp", "cp", "dp", "dp_cp", "ep", "etp", "edp"]

# Our name of an axis, Megatron-Core's name of its group, and the axes along which the group's ranks differ.
AXES: tuple[tuple[Axis, str, tuple[str, ...]], ...] = (
    ("tp", "tp", ("tp",)),
    ("pp", "pp", ("pp",)),
    ("cp", "cp", ("cp",)),
    ("dp", "dp", ("dp",)),
    ("dp_cp", "dp_cp", ("dp", "cp")),
    ("ep", "ep", ("ep",)),
    ("etp", "expt_tp", ("etp",)),
    ("edp", "expt_dp", ("edp",)),
)
EXPERT_AXES = ("etp", "ep", "edp", "pp")
DENSE_AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True, eq=False)
class ParallelContext:
    """Sizes, coordinates and groups of one model, seen from one rank."""

    grid: RankGrid
    rank: int
    coordinates: Coordinates
    collection: ProcessGroupCollection  # what Megatron-Core's own functions take as pg_collection
    model_group: dist.ProcessGroup  # the ranks of one replica: the same dp coordinate, all of tp, pp and cp
    host_group: dist.ProcessGroup  # all ranks, for Python objects and CPU tensors
    host_model_group: dist.ProcessGroup  # the ranks of `model_group`, for Python objects and CPU tensors
    split: SplitWorld | None = None  # where the job has rollout ranks: this context is then of one half only

    @classmethod
    def create(cls, sizes: ParallelSizes, timeout: float = 1800.0, seed: int | None = None) -> ParallelContext:
        """Make Megatron-Core's groups for ``sizes``, and the world itself if the process has not joined one.

        Where Megatron-Core already has groups of the same sizes they are used as they are.

        Args:
            timeout: seconds a collective may wait for its peers.
            seed: seeds all generators and Megatron-Core's tracker, as Megatron-LM does: different for each pipeline
                stage, the same on all other ranks.

        With ``sizes.rollout_ranks`` the job is split first, and the context is that of this rank's half: the training
        ranks' has ``sizes``; the rollout ranks' is one replica over all of them, as they share the same prompts.

        Raises:
            ConfigError: the sizes do not fit the world, or Megatron-Core has groups of other sizes.
        """
        if sizes.vpp > 1 and sizes.pp == 1:
            raise ConfigError(f"parallel.vpp={sizes.vpp} with pp=1: interleaving needs pp of at least 2, or vpp=1")
        split = SplitWorld.join(current_platform(), sizes, timeout) if sizes.rollout_ranks else None
        if split is not None:
            sizes = ParallelSizes(tp=split.num_rollout) if split.on_rollout else sizes.of_training
        elif not dist.is_initialized():
            current_platform().init_process_group(timeout)
        sizes.dp(dist.get_world_size())
        if not megatron_state.model_parallel_is_initialized():
            megatron_state.initialize_model_parallel(
                tensor_model_parallel_size=sizes.tp,
                pipeline_model_parallel_size=sizes.pp,
                virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
                context_parallel_size=sizes.cp,
                expert_model_parallel_size=sizes.ep,
                expert_tensor_parallel_size=sizes.etp,
                distributed_timeout_minutes=math.ceil(timeout / 60),
            )
        context = cls.from_parallel_state(megatron_state, sizes.sequence_parallel, timeout)
        if context.sizes != sizes:
            raise ConfigError(
                f"asked for {sizes!r}, but Megatron-Core is already initialised with {context.sizes!r}: pass that "
                "job's parallel_state, or call parallel_state.destroy_model_parallel() first"
            )
        if seed is not None:
            # Megatron-LM megatron/training/initialize.py _set_random_seed
            stage_seed = seed + 100 * context.coordinates.pp
            current_platform().seed_all(stage_seed)
            model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
        return replace(context, split=split)

    @classmethod
    def from_parallel_state(
        cls, parallel_state: ModuleType, sequence_parallel: bool = False, timeout: float = 1800.0
    ) -> ParallelContext:
        """Take the groups of a job that has called ``parallel_state.initialize_model_parallel``.

        The groups are read once: later changes of ``parallel_state`` do not reach this context.

        Raises:
            ConfigError: ``parallel_state`` is not initialised, or orders its ranks in another way than
                Megatron-Core's default ``tp-cp-ep-dp-pp``.
        """
        if not parallel_state.model_parallel_is_initialized():
            raise ConfigError(
                "parallel_state has no groups yet: call parallel_state.initialize_model_parallel(...) before the "
                "model is wrapped, or leave parallel_state out and give the sizes"
            )
        vpp = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
        collection = ProcessGroupCollection.use_mpu_process_groups()
        return cls.from_process_groups(collection, vpp, sequence_parallel, timeout)

    @classmethod
    def from_process_groups(
        cls,
        collection: ProcessGroupCollection,
        vpp: int = 1,
        sequence_parallel: bool = False,
        timeout: float = 1800.0,
    ) -> ParallelContext:
        """Take the groups of a `ProcessGroupCollection` that spans the whole world.

        Raises:
            ConfigError: a group is missing, or holds other ranks than Megatron-Core's default order gives it.
        """
        groups: dict[str, Any] = {name: getattr(collection, theirs, None) for name, theirs, _ in AXES}
        missing = [theirs for name, theirs, _ in AXES if groups[name] is None]
        if missing:
            raise ConfigError(
                f"the process groups lack {', '.join(missing)}: fill them in, with groups of one rank where an axis "
                "is not used"
            )
        length = {name: group.size() for name, group in groups.items()}
        sizes = ParallelSizes(
            **{axis: length[axis] for axis in ("tp", "pp", "cp", "ep", "etp")},
            vpp=vpp,
            sequence_parallel=sequence_parallel,
        )
        grid, rank = RankGrid(sizes, dist.get_world_size()), dist.get_rank()
        for axis, _, varying in AXES:
            _check(grid, rank, axis, varying, ranks_of(groups[axis]))
        platform = current_platform()
        replicas = grid.partition("dp")
        known = [group for group in [getattr(collection, "mp", None)] if group is not None]
        model = own_group(replicas, platform.backend, timeout, known)
        everyone = (tuple(range(grid.world_size)),)
        return cls(
            grid=grid,
            rank=rank,
            coordinates=grid.coordinates(rank),
            collection=collection,
            model_group=model,
            host_group=own_group(everyone, platform.host_backend, timeout),
            host_model_group=own_group(replicas, platform.host_backend, timeout, [model]),
        )

    @classmethod
    def current(cls) -> ParallelContext | None:
        """The context of the groups that Megatron-Core has in this process; None before there are any."""
        if not megatron_state.model_parallel_is_initialized():
            return None
        return cls.from_parallel_state(megatron_state)

    @staticmethod
    def forget() -> None:
        """Take Megatron-Core's groups down, so that this process can `create` a context of other sizes. Every group of
        the process but the world's is ended: what still uses one must not be used any more."""
        megatron_state.destroy_model_parallel()
        if dist.is_initialized():
            end_groups()

    @property
    def sizes(self) -> ParallelSizes:
        return self.grid.sizes

    @property
    def world_size(self) -> int:
        return self.grid.world_size

    @property
    def dp_size(self) -> int:
        return self.grid.dp

    @property
    def num_consumers(self) -> int:
        """Training replicas among which the samples of this half are divided."""
        return self.dp_size if self.split is None else self.split.training.dp

    @property
    def dp_cp_size(self) -> int:
        return self.grid.dp * self.sizes.cp

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def cp_group(self) -> dist.ProcessGroup:
        return self.collection.cp

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Data-parallel ranks, without the context-parallel ones."""
        return self.collection.dp

    @property
    def is_last_stage(self) -> bool:
        """Whether this is the last pipeline stage, where logits and losses are."""
        return self.coordinates.pp == self.sizes.pp - 1

    @property
    def leads_replica(self) -> bool:
        """Whether this is the first rank of its replica, all of whose ranks hold the same samples."""
        at = self.coordinates
        return at.tp == at.pp == at.cp == 0

    @functools.cached_property
    def agreement(self) -> Agreement:
        """Of all ranks of the job."""
        return Agreement(GroupPeers(self.host_group))

    @functools.cached_property
    def model_agreement(self) -> Agreement:
        """Of the ranks of this replica."""
        return Agreement(GroupPeers(self.host_model_group))

    def attempt(self, what: str) -> AbstractContextManager[Attempt]:
        """`Agreement.attempt` of all ranks: what fails on one of them fails on all. Collective."""
        return self.agreement.attempt(what)

    def gather_objects(self, value: T, axis: Literal["world", "model"] = "world") -> list[T]:
        """``value`` of every rank along ``axis``, in rank order, on every rank; through host memory, by pickle."""
        return gather_objects(value, self.host_group if axis == "world" else self.host_model_group)

    def objects_on_rank_0(self, value: T) -> list[T]:
        """As `gather_objects` on rank 0 of the world; an empty list on the other ranks, which need no memory for it."""
        return objects_on_first(value, self.host_group)

    def __str__(self) -> str:
        at = ", ".join(f"{axis} {getattr(self.coordinates, axis)}" for axis in DENSE_AXES)
        return f"rank {self.rank} of {self.world_size} at {at} in {self.sizes}, DP{self.dp_size}"


def _check(grid: RankGrid, rank: int, axis: Axis, varying: tuple[str, ...], given: tuple[int, ...]) -> None:
    """Raise unless ``given`` are the ranks that differ from ``rank`` along ``varying`` only."""
    family = EXPERT_AXES if axis in ("ep", "etp", "edp") else DENSE_AXES
    place = grid.coordinates(rank)
    expected = grid.ranks(**{name: getattr(place, name) for name in family if name not in varying})
    if given != expected:
        raise ConfigError(
            f"on rank {rank} the {axis} group holds ranks {list(given)}, but in {grid.sizes} over {grid.world_size} "
            f"ranks it must hold {list(expected)}: initialise Megatron-Core with its default "
            "order='tp-cp-ep-dp-pp' over the whole world"
        )
