"""`Bucket`: a part of a target layout that is transferred, and handed on, by itself.

A bucket holds whole shards of the target and all logical tensors in them, so that each shard is complete when its
bucket has arrived. Every rank computes the same buckets, from the layout alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.reshard.layout import Layout, Shard
from megatron_rl.reshard.plan import RankPlan
from megatron_rl.reshard.wire_format import WireFormat

OPEN_BUCKETS = 8  # that a shard may still go into: more fill them hardly better
ALIGNMENT = 256  # bytes between the beginnings of two shards of a bucket


@dataclass(frozen=True)
class Bucket:
    """Written by `cut_buckets`."""

    shards: frozenset[str]  # names of target shards, of all ranks
    tensors: frozenset[str]  # the logical tensors in them
    num_bytes: int  # on the rank that holds most of it


def shard_dtype(shard: Shard, wire: WireFormat) -> torch.dtype:
    """The dtype that the shard's values travel in."""
    return wire.of(shard.spans[0].tensor if shard.spans else shard.like)


def shard_bytes(shard: Shard, wire: WireFormat) -> int:
    """The room that it takes in a bucket."""
    return -(-math.prod(shard.shape) * shard_dtype(shard, wire).itemsize // ALIGNMENT) * ALIGNMENT


def cut_buckets(layout: Layout, wire: WireFormat, max_bytes: int) -> list[Bucket]:
    """Shards of up to ``max_bytes`` together on each rank, each in the first of the last few buckets that has room for
    it, in the order of the layout. What cannot be cut further
    (a shard with all that shares a logical tensor with it) is a bucket of its own where it is larger."""
    units = _Units()
    for number, replica in enumerate(layout.replicas):
        for shard in layout.emit(replica):
            units.add(number, shard, shard_bytes(shard, wire))
    buckets: list[Bucket] = []
    for unit in units.merged():
        last = range(max(len(buckets) - OPEN_BUCKETS, 0), len(buckets))
        found = next((i for i in last if buckets[i].num_bytes + unit.num_bytes <= max_bytes), None)
        if found is None:
            buckets.append(unit)
        else:
            other = buckets[found]
            num_bytes = other.num_bytes + unit.num_bytes
            buckets[found] = Bucket(other.shards | unit.shards, other.tensors | unit.tensors, num_bytes)
    return buckets


class _Units:
    """Shard names that belong together because ranks hold parts of one logical tensor in them."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}  # of each shard name, up to the first of its unit
        self._home: dict[str, str] = {}  # logical tensor -> a shard that holds some of it
        self._sizes: dict[str, dict[int, int]] = {}  # shard name -> number of the replica group -> bytes

    def add(self, replica: int, shard: Shard, num_bytes: int) -> None:
        self._parent.setdefault(shard.name, shard.name)
        self._sizes.setdefault(shard.name, {})[replica] = num_bytes
        for span in shard.spans:
            home = self._home.setdefault(span.tensor, shard.name)
            if home != shard.name:
                self._parent[self._root(shard.name)] = self._root(home)

    def merged(self) -> Iterator[Bucket]:
        shards: dict[str, list[str]] = {}
        tensors: dict[str, set[str]] = {}
        for name in self._parent:
            shards.setdefault(self._root(name), []).append(name)
        for tensor, name in self._home.items():
            tensors.setdefault(self._root(name), set()).add(tensor)
        for root, names in shards.items():
            held: dict[int, int] = {}
            for name in names:
                for replica, num_bytes in self._sizes[name].items():
                    held[replica] = held.get(replica, 0) + num_bytes
            yield Bucket(frozenset(names), frozenset(tensors.get(root, ())), max(held.values()))

    def _root(self, name: str) -> str:
        while self._parent[name] != name:
            name = self._parent[name]
        return name


def split_plan(plan: RankPlan, buckets: Sequence[Bucket]) -> list[RankPlan]:
    """The part of ``plan`` that fills each bucket."""
    number = {tensor: number for number, bucket in enumerate(buckets) for tensor in bucket.tensors}
    fields = []
    for jobs in (plan.sends, plan.receives, plan.copies, plan.duplicates):
        parts: list[list[Any]] = [[] for _ in buckets]
        for job in jobs:
            parts[number[job.tensor]].append(job)
        fields.append([tuple(part) for part in parts])
    return [RankPlan(plan.rank, *part) for part in zip(*fields, strict=True)]
