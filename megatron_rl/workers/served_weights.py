"""`ServedWeights`: which version of the weights the rollout engines serve, and the pushes that make it the newest.

Versions count the changes of the training weights. Where the job has rollout ranks, pushes cross the bridge between
them and the training ranks (`parallel.worlds`).
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from megatron_rl.engines.base import TrainingEngine
from megatron_rl.reshard import Layout, P2PTransport, Transport
from megatron_rl.rollout.base import WeightCheck
from megatron_rl.weights.fingerprint import Fingerprint
from megatron_rl.weights.sync import PUSH_SECONDS, SyncReport, WeightSync, default_transport
from megatron_rl.weights.target import TargetAs, TargetElsewhere, TargetFacts, WeightTarget, renumbered, within
from megatron_rl.workers.actor_config import RolloutConfig
from megatron_rl.workers.lazy_engine import LazyEngine

logger = logging.getLogger(__name__)


class ServedWeights:
    """One rank's view of the weights that its rollout engine serves.

    Attributes:
        trained_version: of the weights that training holds.
        target_facts: what the rollout ranks' engine is like; set on training ranks before the first push to it.
    """

    def __init__(self, model: TrainingEngine, engine: LazyEngine, config: RolloutConfig) -> None:
        self.trained_version = 0
        self.target_facts: TargetFacts | None = None
        self._model, self._engine, self._config = model, engine, config
        self._served_version: int | None = None  # of the weights that the engine holds
        self._fingerprint = Fingerprint()
        self._pushed: dict[str, int] = {}  # checksums of this rank's weights when they were pushed
        self._sync: WeightSync | None = None
        self._transport: Transport | None = None
        self._replica_sync: WeightSync | None = None  # among the ranks of this model replica
        self._asleep = False

    def needs_push(self) -> bool:
        """Whether the engine lacks the newest weights. A change outside of `Actor.optimize`, on any rank, makes a new
        version. Collective, with the same result on every rank."""
        outdated, changed = self._served_version != self.trained_version, []
        if not outdated:
            changed = self._changed()
        facts = torch.tensor([int(outdated or bool(changed)), self.trained_version])
        dist.all_reduce(facts, op=dist.ReduceOp.MAX, group=self._model.context.host_group)
        somewhere, version = facts.tolist()
        self.trained_version = version + (bool(somewhere) and version == self._served_version)
        if changed:
            logger.info(
                "%d weights of this rank were changed outside of Actor, for example %s: they become version %d",
                len(changed),
                min(changed),
                self.trained_version,
            )
        return bool(somewhere)

    def push(self) -> SyncReport:
        """Push the training weights to the engine as `trained_version`; collective over all ranks."""
        if self._asleep:
            self._engine.get().wake()
            self._asleep = False
        if self._sync is None:
            # Creating a transport can be collective over all ranks: all take part here.
            target, self._transport = self._target(), default_transport(self._model.context.split)
            self._sync = self._make_sync(self._model.layout, target, self._transport)
        report = self._sync.push(self._model.published(), self.trained_version)
        self._served_version = self.trained_version
        self._pushed = self._fingerprint(self._model.tensors())
        return report

    def push_again(self, why: str) -> None:
        """Push the newest weights again to servers that lost them during a generate call. Only the ranks of this model
        replica take part: they hold all weights, unless experts are distributed over data-parallel ranks.

        Raises:
            RuntimeError: these ranks do not hold all weights.
        """
        if self._model.context.split is not None:
            raise RuntimeError(
                f"{why}, and the training ranks, which alone hold weights, work on the next step: start more servers "
                f"for each replica with actor.rollout.options.servers, or resume from the last checkpoint"
            )
        ranks, engine = self._engine.placement.ranks, self._engine.get()
        logger.warning("weights version %s are pushed again: %s", self._served_version, why)
        if self._replica_sync is None:
            source, target = within(self._model.layout, ranks), TargetAs(engine, within(engine.layout, ranks))
            self._replica_sync = self._make_sync(source, target, self._replica_transport())
        try:
            self._replica_sync.push(self._model.published(), self.trained_version)
        except ValueError as error:
            raise RuntimeError(
                f"{why}, and the ranks that share its prompts do not hold all weights ({error}): start more servers "
                f"for each replica with actor.rollout.options.servers, or resume from the last checkpoint"
            ) from None

    def verify(self) -> WeightCheck:
        """Check that all engines still hold the pushed weights, and that the training weights are still those, unless
        newer ones are known; collective over all ranks."""
        if self._served_version is None:
            return WeightCheck()
        context = self._model.context
        own = WeightCheck()  # of training ranks whose engines are elsewhere
        if context.split is None or context.split.on_rollout:
            engine = self._engine.get()
            own = self._verify_here() if engine.targets() else engine.verify_weights()
        faults = list(own.faults)
        if self._served_version == self.trained_version and (changed := self._changed()):
            faults.append(
                f"training rank {context.rank} holds other weights than version {self._served_version} that was "
                f"pushed, for example {min(changed)}: they were changed outside of Actor, and the next sample pushes "
                "them"
            )
        checks = context.gather_objects((own.compared, faults))
        return WeightCheck(sum(compared for compared, _ in checks), tuple(fault for _, f in checks for fault in f))

    def sleep(self) -> None:
        """Put the engine to sleep until the next push; it loses its weights."""
        if not self._asleep:
            self._engine.get().sleep()
            self._served_version, self._asleep = None, True

    def resume_at(self, version: int) -> None:
        """Training holds ``version``, loaded from a checkpoint: what the engine serves is outdated."""
        self.trained_version, self._served_version = version, None

    def _changed(self) -> list[str]:
        """This rank's weights that are not those of the last push."""
        found = self._fingerprint(self._model.tensors())
        return [name for name in found.keys() | self._pushed.keys() if found.get(name) != self._pushed.get(name)]

    def _target(self) -> WeightTarget:
        """The engine, with ranks numbered as in the push."""
        split = self._model.context.split
        if split is None:
            return self._engine.get()
        layout = renumbered(self._engine.layout, split.num_training)
        if split.on_rollout:
            return TargetAs(self._engine.get(), layout)
        assert self.target_facts is not None, "rollout ranks have not said what their engine is like"
        return TargetElsewhere(layout, self.target_facts)

    def _replica_transport(self) -> Transport | None:
        """Between the ranks of this model replica."""
        context = self._model.context
        if context.world_size == len(self._engine.placement.ranks):
            return self._transport
        group = context.host_model_group if self._model.device.type == "cpu" else context.collection.mp
        return P2PTransport(group, PUSH_SECONDS)

    def _make_sync(self, source: Layout, target: WeightTarget, transport: Transport | None) -> WeightSync:
        context = self._model.context
        return WeightSync(
            source,
            target,
            rank=context.rank if context.split is None else context.split.rank,
            # An engine in another process has no tensors here that show the dtype.
            wire_dtype=self._engine.dtype if target.streams or context.split is not None else None,
            max_staging_bytes=self._config.max_staging_bytes,
            attest=self._config.attest,
            device=self._model.device,
            transport=transport,
        )

    def _verify_here(self) -> WeightCheck:
        """`verify` of an engine in this process; each replica is counted once."""
        found = self._sync.verify() if self._sync is not None else None
        if found is None:
            return WeightCheck()
        rank = self._model.context.rank
        named = tuple(f"the engine on rank {rank} no longer holds what was pushed: {fault}" for fault in found)
        return WeightCheck(int(self._engine.placement.tp_rank(rank) == 0), named)
