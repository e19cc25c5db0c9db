"""Process groups that Megatron-Core does not make: one per world and set of ranks, made on first demand.

Every rank must ask for the same partitions in the same order, as with `torch.distributed.new_group`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

T = TypeVar("T")
Partition = tuple[tuple[int, ...], ...]

# A communicator belongs to the world, not to its first user: several models in one job share it, and it
# goes when `destroy_process_group` ends the world that is its key.
_MADE: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Partition, str], dist.ProcessGroup]] = WeakKeyDictionary()


def world_group() -> dist.ProcessGroup:
    """The group of all ranks.

    Raises:
        RuntimeError: torch.distributed has not been initialised.
    """
    world = dist.group.WORLD
    if world is None:
        raise RuntimeError("torch.distributed is not initialised: call init_process_group() first")
    return world


def group_beside(name: str, backend: str, store: dist.Store, rank: int, size: int, timeout: float) -> dist.ProcessGroup:
    """A group over processes that are not one world: members are numbered from 0 to ``size`` - 1, and find one another
    in ``store``. torch has no public constructor; its own helper is used, as slime (`init_process_group`) and verl do.
    """
    made: Any = c10d._new_process_group_helper  # typed differently from version to version
    shared = dist.PrefixStore(name, store)
    group, _ = made(size, rank, [], dist.Backend(backend), shared, name, timeout=timedelta(seconds=timeout))
    c10d._world.pg_group_ranks[group] = {number: number for number in range(size)}
    return group


def end_groups() -> None:
    """End all groups but the world's. Each gloo group of a process has a thread that wakes 100 times a second, and
    each NCCL communicator memory of its own, for as long as torch's register of groups holds it."""
    world = world_group()
    _MADE.pop(world, None)
    for group in c10d._world.pg_map.copy():
        if group is not world:
            dist.destroy_process_group(group)
    gc.collect()  # models and optimizers that nothing uses any more refer to one another, and to groups


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    """Global ranks of ``group``, in the order of their ranks inside it."""
    return tuple(dist.get_process_group_ranks(group))


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """``value`` of every rank of ``group``, in the order of its ranks, on every rank; by pickle. None: one process."""
    if group is None or group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def objects_on_first(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """As `gather_objects` on the first rank of ``group``, the only one that holds them; an empty list on the others."""
    if group is None or group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size() if group.rank() == 0 else []
    dist.gather_object(value, values or None, group=group, group_dst=0)
    return values


def own_group(
    partition: Partition, backend: str, timeout: float, known: Iterable[dist.ProcessGroup] = ()
) -> dist.ProcessGroup:
    """This rank's group among the disjoint sets of ``partition``; collective over the world when it is first made.

    Args:
        partition: sets of global ranks; every rank of the world is in exactly one.
        backend: communication backend of the group.
        timeout: seconds.
        known: groups that will do as they are, if their ranks and backend fit; every rank passes the same ones.
    """
    mine = next(ranks for ranks in partition if dist.get_rank() in ranks)
    for group in (world_group(), *known):
        if ranks_of(group) == mine and dist.get_backend(group) == backend:
            return group
    made = _MADE.setdefault(world_group(), {})
    if (partition, backend) not in made:
        groups = {ranks: dist.new_group(ranks, timedelta(seconds=timeout), backend) for ranks in partition}
        made[partition, backend] = groups[mine]
    return made[partition, backend]
