"""`WeightSync`: the push of a trainer's weights into a rollout engine, again and again.

The first push plans; later ones replay the plan. Between `begin_update` and `commit_update` the engine's weights are a
mixture of two versions, which it must not serve.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.reshard import (
    Layout,
    LocalTransport,
    P2PTransport,
    Resharder,
    Topology,
    TransferReport,
    Transport,
    WireFormat,
)
from megatron_rl.weights.fill import empty_tensors

logger = logging.getLogger(__name__)

MAX_STAGING_BYTES = 64 << 20


class WeightTarget(Protocol):
    """What a push needs of a rollout engine (`rollout.RolloutEngine` is one)."""

    @property
    def layout(self) -> Layout:
        """Where each rank's shards of the engine's weights sit, or are handed in."""
        ...

    def targets(self) -> Mapping[str, Tensor]:
        """This rank's own storage by shard name, padding zero; empty where the weights live in another process."""
        ...

    def begin_update(self) -> None: ...

    def commit_update(self, version: int) -> None: ...

    def load_shards(self, shards: Mapping[str, Tensor], version: int) -> None:
        """A whole update in one call, for an engine without `targets`."""
        ...


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One push, seen from one rank. Written by `WeightSync.push`."""

    version: int
    plan_s: float  # seconds spent on planning; 0.0 after the first push
    total_s: float  # seconds of the whole push, planning and loading included
    transfer: TransferReport

    def __str__(self) -> str:
        return f"weights version {self.version} in {self.total_s:.3f} s (planning {self.plan_s:.3f} s): {self.transfer}"


class WeightSync:
    """Carries one rank's part of the weights from layout ``source`` to the layout of ``target``.

    Args:
        source: where the trainer's weights sit, for example `models.megatron_layout`; equal on all ranks.
        target: the rollout engine, or this rank's handle of it.
        rank: this rank, as both layouts number ranks.
        transport: reaches every rank of both layouts; None takes the default process group, if there is one.
        wire_dtype: what the values travel in, equal on all ranks: the engine's dtype moves the fewest bytes. None takes
            that of the engine's tensors, which every rank of ``source`` must then hold.
        max_staging_bytes: limit on extra memory during a push, apart from the shards of an engine without `targets`.
        topology: which ranks share a node; None puts all on one.
    """

    def __init__(
        self,
        source: Layout,
        target: WeightTarget,
        rank: int,
        transport: Transport | None = None,
        wire_dtype: torch.dtype | WireFormat | None = None,
        max_staging_bytes: int = MAX_STAGING_BYTES,
        topology: Topology | None = None,
    ) -> None:
        self.source, self.target, self.rank = source, target, rank
        self._transport = transport or default_transport()
        self._wire, self._topology, self._max_staging_bytes = wire_dtype, topology, max_staging_bytes
        self._resharder: Resharder | None = None
        self._staged: dict[str, Tensor] = {}

    def push(self, tensors: Mapping[str, Tensor], version: int) -> SyncReport:
        """Make the engine serve ``tensors`` (shard name -> this rank's tensor) as ``version``. Collective.

        Raises:
            ValueError: tensors that do not fit the layouts, or ``wire_dtype`` is needed.
            TransportError: another rank failed; the engine does not serve until a later push succeeds.
        """
        start = time.perf_counter()
        own = self.target.targets()
        takes_part = self.rank in self.target.layout.cells
        first = self._resharder is None
        resharder = self._resharder or self._plan(own)
        plan_s = time.perf_counter() - start if first else 0.0
        if own:
            self.target.begin_update()
        elif takes_part and not self._staged:
            device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
            self._staged = empty_tensors(self.target.layout, self.rank, resharder.wire.dtype, device)
        transfer = resharder.run(tensors, own or self._staged)
        if own:
            self.target.commit_update(version)
        elif takes_part:
            self.target.load_shards(self._staged, version)
        report = SyncReport(version, plan_s, time.perf_counter() - start, transfer)
        logger.debug("%s", report)
        return report

    def _plan(self, own: Mapping[str, Tensor]) -> Resharder:
        wire = self._wire or next((tensor.dtype for tensor in own.values()), None)
        apart = self.source.cells.keys() - self.target.layout.cells.keys()
        if wire is None or (self._wire is None and apart):
            raise ConfigError(
                "wire_dtype must be given where some ranks hold no rollout weights, since they cannot know the "
                "engine's dtype: pass the dtype that the rollout engine runs in"
            )
        self._resharder = Resharder(
            self.source,
            self.target.layout,
            self.rank,
            self._transport,
            wire,
            self._max_staging_bytes,
            self._topology,
        )
        logger.info("weights: %s -> %s; %s", self.source.name, self.target.layout.name, self._resharder.plan)
        return self._resharder


def default_transport() -> Transport:
    """Batched point-to-point messages where the process has joined a world of several ranks; none otherwise."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return P2PTransport()
    return LocalTransport()
