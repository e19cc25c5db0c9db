"""`WeightTarget`: what a push of weights needs of a rollout engine (`rollout.RolloutEngine` is one)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from megatron_rl.reshard import Layout


class WeightTarget(Protocol):
    """One rank's handle of an engine."""

    @property
    def layout(self) -> Layout:
        """Where each rank's shards of the engine's weights sit, or are handed in."""
        ...

    def targets(self) -> Mapping[str, Tensor]:
        """This rank's own storage by shard name, padding zero; empty where the weights live in another process."""
        ...

    def begin_update(self) -> None: ...

    def stage_shards(self, shards: Mapping[str, Tensor]) -> None:
        """For an engine without `targets`: deliver all shards, to be served from `commit_update` on."""
        ...

    def commit_update(self, version: int) -> None: ...

    def abort_update(self, intact: bool) -> None:
        """``intact``: nothing was written since `begin_update`."""
        ...
