"""`WeightSync`: the push of a trainer's weights into a rollout engine, again and again, as a two-phase commit.

    begin --all ready?--> for each bucket: transfer, attest, write --all hold it?--> commit
      '-- no: the old version serves on      '------ no: nobody commits, what is half written refuses to serve

An engine with storage in this process is written in place, in one bucket (`targets`); others get a stream of buckets
(`stream`). The first push plans; later ones replay the plan. An engine serves one version whole, or refuses: whatever
dies in between, the survivors learn of it within the transport's timeout, and the next push writes everything anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.parallel.agreement import Agreement
from megatron_rl.parallel.worlds import SplitWorld
from megatron_rl.reshard import (
    Layout,
    LocalTransport,
    P2PTransport,
    Readable,
    Resharder,
    ReshardPlan,
    Topology,
    TransferReport,
    Transport,
    TransportError,
    WireFormat,
    shifted,
)
from megatron_rl.weights.attestation import Attestor
from megatron_rl.weights.diagnosis import AttestationError, Fault, faults
from megatron_rl.weights.stream import BucketStream, message_bytes
from megatron_rl.weights.target import WeightTarget

logger = logging.getLogger(__name__)

MAX_STAGING_BYTES = 64 << 20
# How long a push waits for another rank: servers may have to start in the meantime. A rank that has died is noticed at
# once where its connections close with it, as those of gloo do.
PUSH_SECONDS = 1800.0
ATTEMPTS = 3  # of one push, where servers are lost while they are written

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One push, seen from one rank. Written by `WeightSync.push`."""

    version: int
    plan_s: float  # seconds spent on planning; 0.0 after the first push
    attest_s: float  # seconds spent on checksums and their sum over the ranks; 0.0 where they are switched off
    write_s: float  # seconds spent waiting for an engine in another process
    total_s: float  # seconds of the whole push
    transfer: TransferReport
    peak_bytes: int  # extra memory of this rank, counted as it is allocated
    num_buckets: int = 1
    num_oversized: int = 0  # of the buckets, those that passed the limit on extra memory: single shards that do
    unverified: str = ""  # why the engine could not prove that it holds the weights; "" = it did, or lies here

    def __str__(self) -> str:
        parts = f"planning {self.plan_s:.3f} s, attestation {self.attest_s:.3f} s, writing {self.write_s:.3f} s"
        memory = f"{self.num_buckets} buckets ({self.num_oversized} over the limit), {self.peak_bytes:,} B of memory"
        return f"weights version {self.version} in {self.total_s:.3f} s ({parts}; {memory}): {self.transfer}"


class WeightSync:
    """Carries one rank's part of the weights from layout ``source`` to the layout of ``target``.

    Args:
        source: where the trainer's weights sit, for example `models.megatron_layout`; equal on all ranks.
        target: the rollout engine, or this rank's handle of it.
        rank: this rank, as both layouts number ranks.
        transport: reaches every rank of both layouts; None takes the default process group, if there is one. Its
            timeout is the longest that a push waits for a rank that has died.
        wire_dtype: what the values travel in, equal on all ranks: the engine's dtype moves the fewest bytes, and
            tensors that ``target.layout`` gives another dtype travel in that. None takes the engine's, whose tensors
            every rank of ``source`` must then hold.
        max_staging_bytes: limit on extra memory of a rank during a push; see `BucketStream` on shards that are larger.
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
        self._stream: BucketStream | None = None
        self._takes_part = rank in target.layout.replica_of
        ranks = sorted(source.replica_of.keys() | target.layout.replica_of.keys())
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
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._push(tensors, version, last=attempt == ATTEMPTS)
            except _TryAgainError as failure:
                logger.warning("weights did not reach all servers; trying again (%s)", failure.__cause__)
        raise AssertionError("the last attempt raises or returns")

    def _push(self, tensors: Mapping[str, Readable], version: int, last: bool) -> SyncReport:
        start, first = time.perf_counter(), self._resharder is None
        tensors = shifted(tensors, self.source, self.target.layout, self.rank)
        own, written, self._begun = self.target.targets(), False, False
        sums: list[Tensor] = []
        try:
            with self._together.attempt() as attempt:
                attempt.run(self._plan, own)
                plan_s = time.perf_counter() - start if first else 0.0
                attempt.statement = self._statement(version)
                attempt.run(self._begin, tensors, own)
                if self._stream is not None:
                    attempt.run(self._add_up, tensors, sums)
            written = bool(own) or self._stream is not None
            moved = self._send_buckets(tensors, sums, last) if self._stream else self._fill(tensors, own)
            self._commit(version)
        except _TryAgainError:
            raise
        except BaseException:
            self._abort(intact=not written)
            raise
        report = replace(moved, version=version, plan_s=plan_s, total_s=time.perf_counter() - start)
        logger.debug("%s", report)
        return report

    def _fill(self, tensors: Mapping[str, Readable], own: Mapping[str, Tensor]) -> SyncReport:
        """Transfer into the engine's own storage, and attest."""
        transfer = self._transfer()
        attest_s = self._timed(self._attest, tensors, own)
        return SyncReport(0, 0.0, attest_s, 0.0, 0.0, transfer, transfer.peak_staging_bytes)

    def _send_buckets(self, tensors: Mapping[str, Readable], sums: Sequence[Tensor], last: bool) -> SyncReport:
        """Stream the buckets, and vote on whether all engines hold all of them.

        Raises:
            _TryAgainError: engines failed, and nothing else: on all ranks.
        """
        assert self._stream is not None
        start = time.perf_counter()
        expected = self._together.peers.total(sums[0]) if sums else None
        attest_s = time.perf_counter() - start if sums else 0.0
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        moved = self._stream.run(tensors, expected, self._previous, device)
        try:
            with self._together.attempt() as attempt:
                attempt.error = moved.error
        except TransportError:
            raise
        except Exception as error:
            objections = self._together.peers.total(torch.tensor([int(not moved.may_retry)]))
            if last or int(objections):
                raise
            raise _TryAgainError from error
        self._previous = expected
        assert moved.transfer is not None
        return SyncReport(
            version=0,
            plan_s=0.0,
            attest_s=moved.attest_s + attest_s,
            write_s=moved.write_s,
            total_s=0.0,
            transfer=moved.transfer,
            peak_bytes=moved.peak_bytes,
            num_buckets=len(self._stream.buckets),
            num_oversized=self._stream.num_oversized,
            unverified=moved.unverified,
        )

    def verify(self) -> list[Fault] | None:
        """What this rank's engine, one with `targets`, holds otherwise than it was pushed last: a pass over all of its
        weights. None = nothing is known: pushes are not attested."""
        if self._attestor is None or self._previous is None:
            return None
        return faults(self._attestor, self.target.targets(), self._previous)

    def _plan(self, own: Mapping[str, Tensor]) -> None:
        if self._resharder is not None:
            return
        wire = self._wire or self._own_dtype(own)
        apart = self.source.replica_of.keys() - self.target.layout.replica_of.keys()
        if wire is None or (self._wire is None and apart):
            raise ConfigError(
                "wire_dtype must be given where some ranks hold no rollout weights, since they cannot know the "
                "engine's dtype: pass the dtype that the rollout engine runs in"
            )
        self._refuse_stale()
        wire = wire if isinstance(wire, WireFormat) else self.target.layout.dtypes(wire)
        plan = ReshardPlan(self.source, self.target.layout, self._topology)
        cap = self._max_staging_bytes
        messages = message_bytes(cap) if self.target.streams else cap
        resharder = Resharder(
            self.source, self.target.layout, self.rank, self._transport, wire, messages, self._topology, plan
        )
        self._attestor = Attestor(plan, self.rank, resharder.wire) if self._attested else None
        if self.target.streams:
            self._stream = BucketStream(self.target, self.rank, resharder, cap, self._attestor)
        self._resharder = resharder
        logger.info("weights: %s -> %s; %s", self.source.name, self.target.layout.name, resharder.plan)

    def _own_dtype(self, own: Mapping[str, Tensor]) -> torch.dtype | None:
        """What most of the engine's tensors are in: those that its layout gives no dtype of their own."""
        excepted = self.target.layout.dtypes(torch.float32).exceptions
        shards = self.target.layout.shards(self.rank) if own else ()
        most = (shard for shard in shards if not any(span.tensor in excepted for span in shard.spans))
        return next((own[shard.name].dtype for shard in most if shard.name in own), None)

    def _refuse_stale(self) -> None:
        stale = [tensor.name for tensor in self.target.layout.recomputed]
        if stale and not self.target.recomputes:
            raise ConfigError(
                f"a push would leave {len(stale)} tensors stale, first {stale[0]!r}: such an engine computes them from "
                f"its weights, and {type(self.target).__name__} does not do it again (RolloutEngine.recomputes)"
            )

    def _statement(self, version: int) -> str:
        """What all ranks must agree on before anything moves."""
        wire = self._resharder.wire if self._resharder else self._wire
        checks = "attested" if self._attested else "not attested"
        buckets = f"{len(self._stream.buckets)} buckets" if self._stream else "one bucket"
        what = f"version {version} of {self.source.name} for {self.target.layout.name}"
        return f"{what}, sent as {wire} in {buckets}, {checks}"

    def _begin(self, tensors: Mapping[str, Readable], own: Mapping[str, Tensor]) -> None:
        assert self._resharder is not None
        if self._stream is not None:
            self._resharder.check(tensors)
        else:
            self._transfer = self._resharder.bind(tensors, own)
            if self._attestor is not None:
                self._attestor.check_dtypes(own)
        if self._takes_part:
            self._begun = True
            self.target.begin_update()

    def _add_up(self, tensors: Mapping[str, Readable], sums: list[Tensor]) -> None:
        """This rank's part of the checksums that engines are compared with, before anything moves."""
        if self._attestor is not None:
            sums.append(self._attestor.part(tensors))

    def _attest(self, tensors: Mapping[str, Readable], held: Mapping[str, Tensor]) -> None:
        attestor = self._attestor
        if attestor is None:
            with self._together.attempt():  # that the transfer ended everywhere
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


class _TryAgainError(Exception):
    """Servers were lost while they were written; all ranks know."""


def default_transport(split: SplitWorld | None = None) -> Transport:
    """Batched point-to-point messages where the process has joined a world of several ranks, over the bridge where the
    job is split; none otherwise."""
    if split is not None:
        return P2PTransport(split.weights_group, PUSH_SECONDS, split.store, split.rank)
    if dist.is_initialized() and dist.get_world_size() > 1:
        return P2PTransport(timeout=PUSH_SECONDS)
    return LocalTransport()
