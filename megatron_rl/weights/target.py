"""`WeightTarget`: what a push of weights needs of a rollout engine (`rollout.RolloutEngine` is one)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from megatron_rl.reshard import Layout


class WeightTarget(Protocol):
    """One rank's handle of an engine."""

    @property
    def layout(self) -> Layout:
        """Where each rank's shards of the engine's weights sit, or are handed in."""
        ...

    @property
    def streams(self) -> bool:
        """Whether its weights lie in another process and get there by `write_shards`. The same on every rank, also on
        those that hold none of its shards."""
        ...

    @property
    def bucket_copies(self) -> int:
        """For an engine that streams: how often the bytes of a bucket may lie in one rank's memory, that of the next
        bucket included; at least 2. The same on every rank."""
        ...

    def new_buffer(self, num_bytes: int, device: torch.device) -> Tensor:
        """For an engine that streams: memory for buckets, ``[num_bytes]`` uint8, where it reads them best."""
        ...

    @property
    def recomputes(self) -> bool:
        """Whether an update ends with the tensors of ``layout.recomputed`` computed anew. The same on every rank."""
        ...

    def targets(self) -> Mapping[str, Tensor]:
        """This rank's own storage by shard name, padding zero; empty for an engine that streams."""
        ...

    def begin_update(self) -> None: ...

    def write_shards(self, shards: Mapping[str, Tensor], fault: str = "") -> None:
        """For an engine that streams: put some of this rank's shards into it. They are read until the next call has
        returned; a call without shards waits for that. ``fault``: why they must not be written, raised on all ranks of
        the engine. Collective over those."""
        ...

    def finish_update(self) -> str:
        """For an engine that streams: return once it provably holds all that was written; else why that cannot be
        verified. Collective over its ranks."""
        ...

    def commit_update(self, version: int) -> None: ...

    def abort_update(self, intact: bool) -> None:
        """``intact``: nothing was written since `begin_update`."""
        ...


def within(layout: Layout, ranks: Collection[int]) -> Layout:
    """``layout`` as far as it concerns ``ranks``."""
    return replace(layout, replica_of={rank: replica for rank, replica in layout.replica_of.items() if rank in ranks})


def renumbered(layout: Layout, offset: int) -> Layout:
    """``layout`` with ``offset`` added to each rank."""
    return replace(layout, replica_of={rank + offset: replica for rank, replica in layout.replica_of.items()})


class TargetAs:
    """An engine's handle for a push in which its layout is another: some of its replicas, or ranks renumbered."""

    def __init__(self, target: WeightTarget, layout: Layout) -> None:
        self.layout = layout
        self.streams, self.bucket_copies, self.recomputes = target.streams, target.bucket_copies, target.recomputes
        self.targets, self.new_buffer = target.targets, target.new_buffer
        self.begin_update, self.commit_update, self.abort_update = (
            target.begin_update,
            target.commit_update,
            target.abort_update,
        )
        self.write_shards, self.finish_update = target.write_shards, target.finish_update


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What training ranks know of an engine of the rollout ranks."""

    streams: bool
    bucket_copies: int
    recomputes: bool

    @classmethod
    def of(cls, target: WeightTarget) -> TargetFacts:
        return cls(target.streams, target.bucket_copies, target.recomputes)


class TargetElsewhere:
    """An engine of which this rank holds nothing: the training ranks' handle of the rollout ranks' engine."""

    def __init__(self, layout: Layout, facts: TargetFacts) -> None:
        self.layout = layout
        self.streams, self.bucket_copies, self.recomputes = facts.streams, facts.bucket_copies, facts.recomputes

    def targets(self) -> Mapping[str, Tensor]:
        return {}

    def _absent(self) -> NoReturn:
        raise AssertionError("this rank holds no part of the engine, so weight sync does not call it")

    def new_buffer(self, num_bytes: int, device: torch.device) -> Tensor:
        self._absent()

    def begin_update(self) -> None:
        self._absent()

    def write_shards(self, shards: Mapping[str, Tensor], fault: str = "") -> None:
        self._absent()

    def finish_update(self) -> str:
        self._absent()

    def commit_update(self, version: int) -> None:
        self._absent()

    def abort_update(self, intact: bool) -> None:
        self._absent()
