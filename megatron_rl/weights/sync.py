"""`WeightSync`: the push of a trainer's weights into a rollout engine, again and again, as a two-phase commit.

    begin --all ready?--> transfer --attest: all equal?--> stage --all hold it?--> commit
      '-- no: the old version serves on      '------ no: nobody commits, what is half written refuses to serve

The first push plans; later ones replay the plan. An engine serves one version whole, or refuses: whatever dies in
between, the survivors learn of it within the transport's timeout, and the next push writes everything anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.parallel.agreement import Agreement
from megatron_rl.reshard import (
    Layout,
    LocalTransport,
    P2PTransport,
    Readable,
    Resharder,
    ReshardPlan,
    Shard,
    Topology,
    TransferReport,
    Transport,
    WireFormat,
)
from megatron_rl.weights.attestation import Attestor
from megatron_rl.weights.diagnosis import AttestationError, Fault, faults
from megatron_rl.weights.target import WeightTarget

logger = logging.getLogger(__name__)

MAX_STAGING_BYTES = 64 << 20
# That a push waits for another rank: servers may have to start meanwhile. A rank that has died is noticed at once where
# its connections close with it, as those of gloo do.
PUSH_SECONDS = 1800.0

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One push, seen from one rank. Written by `WeightSync.push`."""

    version: int
    plan_s: float  # seconds spent on planning; 0.0 after the first push
    attest_s: float  # seconds spent on checksums and their sum over the ranks; 0.0 where they are switched off
    stage_s: float  # seconds until engines in other processes held the weights
    total_s: float  # seconds of the whole push
    transfer: TransferReport

    def __str__(self) -> str:
        parts = f"planning {self.plan_s:.3f} s, attestation {self.attest_s:.3f} s, staging {self.stage_s:.3f} s"
        return f"weights version {self.version} in {self.total_s:.3f} s ({parts}): {self.transfer}"


class WeightSync:
    """Carries one rank's part of the weights from layout ``source`` to the layout of ``target``.

    Args:
        source: where the trainer's weights sit, for example `models.megatron_layout`; equal on all ranks.
        target: the rollout engine, or this rank's handle of it.
        rank: this rank, as both layouts number ranks.
        transport: reaches every rank of both layouts; None takes the default process group, if there is one. Its
            timeout is the longest that a push waits for a rank that has died.
        wire_dtype: what the values travel in, equal on all ranks: the engine's dtype moves the fewest bytes. None takes
            that of the engine's tensors, which every rank of ``source`` must then hold.
        max_staging_bytes: limit on extra memory during a push, apart from the shards of an engine without `targets`.
        topology: which ranks share a node; None puts all on one.
        attest: compare checksums of both sides before a version is committed; equal on all ranks.
        device: where the ranks' votes must lie while they travel: NCCL wants them on the GPU.
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
        attest: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.target, self.rank = source, target, rank
        self._transport = transport or default_transport()
        self._wire, self._topology, self._max_staging_bytes = wire_dtype, topology, max_staging_bytes
        self._attested, self._device = attest, device
        self._transfer: Callable[[], TransferReport]  # bound in each push
        self._begun = False  # the engine was told of the push under way
        self._resharder: Resharder | None = None
        self._attestor: Attestor | None = None
        self._previous: Tensor | None = None  # the expected checksums of the last push
        self._staged: dict[str, Tensor] = {}
        self._takes_part = rank in target.layout.cells
        ranks = sorted(source.cells.keys() | target.layout.cells.keys())
        peers = self._transport.peers(ranks, rank, device)
        self._together = Agreement(peers, "no engine serves the new version, and the next push starts anew")

    def push(self, tensors: Mapping[str, Readable], version: int) -> SyncReport:
        """Make the engine serve ``tensors`` (shard name -> this rank's tensor) as ``version``. Collective.

        After an error no engine serves ``version``, unless it came while they committed: then each serves ``version``
        whole or refuses. An engine refuses once it was written to, until a later push succeeds.

        Raises:
            ValueError: tensors that do not fit the layouts, or ``wire_dtype`` is needed.
            AttestationError: what this rank's engine holds is not what the trainer does; the message says where.
            PeerError: another rank failed, or ranks push different versions or formats.
            TransportError: another rank is gone.
        """
        start, first = time.perf_counter(), self._resharder is None
        own, written, self._begun = self.target.targets(), False, False
        try:
            with self._together.attempt() as attempt:
                attempt.run(self._plan, own)
                plan_s = time.perf_counter() - start if first else 0.0
                attempt.statement = self._statement(version)
                attempt.run(self._begin, tensors, own)
            written = bool(own)
            transfer = self._transfer()
            attest_s = self._timed(self._attest, tensors, own or self._staged)
            if not own:
                written = self._takes_part
            stage_s = self._timed(self._stage, own)
            self._commit(version)
        except BaseException:
            self._abort(intact=not written)
            raise
        report = SyncReport(version, plan_s, attest_s, stage_s, time.perf_counter() - start, transfer)
        logger.debug("%s", report)
        return report

    def verify(self) -> list[Fault] | None:
        """What this rank's engine, one with `targets`, holds otherwise than it was pushed last: a pass over all of its
        weights. None = nothing is known: pushes are not attested."""
        if self._attestor is None or self._previous is None:
            return None
        return faults(self._attestor, self.target.targets(), self._previous)

    def _plan(self, own: Mapping[str, Tensor]) -> None:
        if self._resharder is not None:
            return
        wire = self._wire or next((tensor.dtype for tensor in own.values()), None)
        apart = self.source.cells.keys() - self.target.layout.cells.keys()
        if wire is None or (self._wire is None and apart):
            raise ConfigError(
                "wire_dtype must be given where some ranks hold no rollout weights, since they cannot know the "
                "engine's dtype: pass the dtype that the rollout engine runs in"
            )
        plan = ReshardPlan(self.source, self.target.layout, self._topology)
        cap = self._max_staging_bytes
        resharder = Resharder(
            self.source, self.target.layout, self.rank, self._transport, wire, cap, self._topology, plan
        )
        self._attestor = Attestor(plan, self.rank, resharder.wire) if self._attested else None
        self._resharder = resharder
        logger.info("weights: %s -> %s; %s", self.source.name, self.target.layout.name, resharder.plan)

    def _statement(self, version: int) -> str:
        """What all ranks must agree on before anything moves."""
        wire = self._resharder.wire if self._resharder else self._wire
        checks = "attested" if self._attested else "not attested"
        return f"version {version} of {self.source.name} for {self.target.layout.name}, sent as {wire}, {checks}"

    def _begin(self, tensors: Mapping[str, Readable], own: Mapping[str, Tensor]) -> None:
        assert self._resharder is not None
        if not own and self._takes_part and not self._staged:
            device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
            self._staged = _empty(self.target.layout.shards(self.rank), self._resharder.wire, device)
        self._transfer = self._resharder.bind(tensors, own or self._staged)
        if self._attestor is not None:
            self._attestor.check_dtypes(own or self._staged)
        if self._takes_part:
            self._begun = True
            self.target.begin_update()

    def _attest(self, tensors: Mapping[str, Readable], held: Mapping[str, Tensor]) -> None:
        attestor = self._attestor
        if attestor is None:
            return
        sums = [torch.zeros(attestor.slots.count, dtype=torch.int64)]
        with self._together.attempt() as attempt:
            attempt.run(lambda: sums.append(attestor.part(tensors)))
            expected = self._together.peers.total(sums[-1])
            attempt.run(self._compare, attestor, held, expected)
        self._previous = expected

    def _compare(self, attestor: Attestor, held: Mapping[str, Tensor], expected: Tensor) -> None:
        found = faults(attestor, held, expected, self._previous)
        if found:
            raise AttestationError(self.rank, found)

    def _stage(self, own: Mapping[str, Tensor]) -> None:
        with self._together.attempt() as attempt:
            if self._takes_part and not own:
                attempt.run(self.target.stage_shards, self._staged)

    def _commit(self, version: int) -> None:
        """From here on an engine that fails is on its own: the others have been told to serve."""
        consequence = f"engines that had committed version {version} serve it whole, the others refuse to serve"
        with self._together.attempt(consequence=consequence) as attempt:
            if self._takes_part:
                attempt.run(self.target.commit_update, version)

    def _abort(self, intact: bool) -> None:
        if self._begun:
            try:
                self.target.abort_update(intact)
            except Exception:  # the error that led here says more
                logger.exception("rank %d could not tell its engine that the update is given up", self.rank)

    @staticmethod
    def _timed(action: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> float:
        start = time.perf_counter()
        action(*args, **kwargs)
        return time.perf_counter() - start


def _empty(shards: Iterable[Shard], wire: WireFormat, device: torch.device) -> dict[str, Tensor]:
    """Zeros for each shard, in the dtype that its values travel in."""
    dtypes = {shard.name: wire.of(shard.spans[0].tensor) if shard.spans else wire.dtype for shard in shards}
    return {shard.name: torch.zeros(shard.shape, dtype=dtypes[shard.name], device=device) for shard in shards}


def default_transport() -> Transport:
    """Batched point-to-point messages where the process has joined a world of several ranks; none otherwise."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return P2PTransport(timeout=PUSH_SECONDS)
    return LocalTransport()
