"""`Rollouts`: the actor's link to its rollout engine: which rank generates what, and which weights version it serves.

All ranks of a model replica know the prompts of their data-parallel rank. Together they form one or more rollout
replicas, divide the prompts among these and exchange the finished samples.
Where the job has rollout ranks (`parallel.worlds`), these alone have engines and share all prompts, as one such
replica; pushes then cross the bridge.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_rl.batch import Prompt, Sample
from megatron_rl.batch.work_time import WorkTime
from megatron_rl.data import Limits
from megatron_rl.devices import current_platform
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.engines.engine_config import DTYPES
from megatron_rl.parallel.abandon import Abandoned, abandonable
from megatron_rl.parallel.groups import own_group
from megatron_rl.reshard import Layout, P2PTransport, Transport
from megatron_rl.rollout.base import (
    ENGINES,
    RolloutEngine,
    SamplingParams,
    ServersLostError,
    WeightCheck,
)
from megatron_rl.rollout.placement import RolloutPlacement
from megatron_rl.weights.fingerprint import Fingerprint
from megatron_rl.weights.sync import PUSH_SECONDS, SyncReport, WeightSync, default_transport
from megatron_rl.weights.target import TargetAs, TargetElsewhere, TargetFacts, WeightTarget, renumbered, within
from megatron_rl.workers.actor_config import RolloutConfig
from megatron_rl.workers.episodes import Episodes
from megatron_rl.workers.prompt_seeds import PromptSeeds
from megatron_rl.workers.response_text import ResponseDecoder
from megatron_rl.workers.tickets import Tickets

logger = logging.getLogger(__name__)

FRUITLESS_PUSHES = 3  # of weights that servers lose again before they have answered anything; they die of the requests
RENDEZVOUS_SECONDS = 600.0  # that a collective of one rollout replica may wait for its ranks


class _Reply(NamedTuple):
    """One rank's result of a generate call, for the other ranks of its model replica."""

    answers: dict[int, list[Any]]  # completions or episodes, by index of the prompt; on a rollout replica's first rank
    lost: str = ""  # the error of servers that have lost their weights
    gave_up: int = 0  # the signal that ended the call


class Rollouts:
    """One rank's view of the rollout engine."""

    def __init__(
        self,
        model: TrainingEngine,
        tokenizer: Any,
        eos: tuple[int, ...],
        config: RolloutConfig,
        seed: int,
        engine: RolloutEngine | None,
    ) -> None:
        if engine is None:
            engine_type = self._engine_type(model, config)
            engine_type.check_model(model.architecture)
            engine_type.check_options(config.options)
        self.model = model
        self.tokenizer = tokenizer
        self.eos = eos
        self.decode = ResponseDecoder(tokenizer, {*eos, tokenizer.pad_token_id}, config.special_tokens)
        self.config = config
        self.seeds = PromptSeeds(seed, model.context)
        self.trained_version = 0  # of the weights that training holds
        self._served_version: int | None = None  # of the weights that the engine holds
        self._fingerprint = Fingerprint()
        self._pushed: dict[str, int] = {}  # checksums of this rank's weights when they were pushed
        self._engine = engine
        self._sync: WeightSync | None = None
        self._transport: Transport | None = None
        self._replica_sync: WeightSync | None = None  # among the ranks of this model replica
        self._asleep = False
        self._work: list[WorkTime] = []  # since `take_work`
        self.target_facts: TargetFacts | None = None  # of the rollout ranks' engine, on training ranks
        context, split = model.context, model.context.split
        ranks = [context.grid.ranks(dp=dp) for dp in range(context.grid.dp)]
        if split is not None:
            ranks = [tuple(range(split.num_rollout))]
        self.placements = [RolloutPlacement(replica, config.tp) for replica in ranks]

    @staticmethod
    def _engine_type(model: TrainingEngine, config: RolloutConfig) -> type[RolloutEngine]:
        return ENGINES[config.engine].for_model(model.architecture)

    @property
    def placement(self) -> RolloutPlacement:
        return self.placements[self.model.context.coordinates.dp]

    def _changed(self) -> list[str]:
        """This rank's weights that are not those of the last push."""
        found = self._fingerprint(self.model.tensors())
        return [name for name in found.keys() | self._pushed.keys() if found.get(name) != self._pushed.get(name)]

    def needs_push(self) -> bool:
        """Whether the engine lacks the newest weights. A change outside of `Actor.optimize`, on any rank, makes a new
        version. Collective, with the same result on every rank."""
        outdated, changed = self._served_version != self.trained_version, []
        if not outdated:
            changed = self._changed()
        facts = torch.tensor([int(outdated or bool(changed)), self.trained_version])
        dist.all_reduce(facts, op=dist.ReduceOp.MAX, group=self.model.context.host_group)
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

    @property
    def dtype(self) -> torch.dtype:
        """Of the rollout weights."""
        return DTYPES[self.config.dtype] if self.config.dtype else self.model.dtype

    @property
    def engine(self) -> RolloutEngine:
        """The engine, built on first use."""
        if self._engine is None:
            self._engine = self._build_engine()
        return self._engine

    def _replicas(self) -> tuple[tuple[int, ...], ...]:
        return tuple(replica for placement in self.placements for replica in placement.replicas)

    def _engine_layout(self) -> Layout:
        architecture, config = self.model.architecture, self.config
        return self._engine_type(self.model, config).lay_out(architecture, config.tp, self._replicas(), config.ep)

    def _build_engine(self) -> RolloutEngine:
        model, tp = self.model, self.config.tp
        if model.context.split is not None and not model.context.split.on_rollout:
            raise RuntimeError(
                "this is one of the training ranks of a job with rollout ranks, which alone generate: let `Trainer` "
                "run the flow"
            )
        platform = current_platform()
        group = own_group(self._replicas(), platform.backend, RENDEZVOUS_SECONDS) if tp > 1 else None
        engine = self._engine_type(model, self.config)
        return engine(  # type: ignore[call-arg]
            architecture=model.architecture,
            layout=self._engine_layout(),
            rank=model.context.rank,
            dtype=self.dtype,
            tp_group=group,
            eos_token_ids=self.eos,
            tokenizer=self.tokenizer,
            max_running=self.config.max_running,
            device=model.device,
            **self.config.options,
        )

    def limits(self, max_tokens: int) -> Limits:
        """Vocabulary and length limits of prompts whose responses may have ``max_tokens``."""
        architecture, config = self.model.architecture, self.config
        context = self._engine_type(self.model, config).context(config.options, architecture.max_positions)
        return Limits(architecture.vocab, context, max_tokens)

    def push(self) -> SyncReport:
        """Push the training weights to the engine as `trained_version`; collective over all ranks."""
        if self._asleep:
            self.engine.wake()
            self._asleep = False
        if self._sync is None:
            # Creating a transport can be collective over all ranks: all take part here.
            target, self._transport = self._target(), default_transport(self.model.context.split)
            self._sync = self._make_sync(self.model.layout, target, self._transport)
        report = self._sync.push(self.model.published(), self.trained_version)
        self._served_version = self.trained_version
        self._pushed = self._fingerprint(self.model.tensors())
        return report

    def _target(self) -> WeightTarget:
        """The engine, with ranks numbered as in the push."""
        split = self.model.context.split
        if split is None:
            return self.engine
        layout = renumbered(self._engine_layout(), split.num_training)
        if split.on_rollout:
            return TargetAs(self.engine, layout)
        assert self.target_facts is not None, "rollout ranks have not said what their engine is like"
        return TargetElsewhere(layout, self.target_facts)

    def _replica_transport(self) -> Transport | None:
        """Between the ranks of this model replica."""
        context = self.model.context
        if context.world_size == len(self.placement.ranks):
            return self._transport
        group = context.host_model_group if self.model.device.type == "cpu" else context.collection.mp
        return P2PTransport(group, PUSH_SECONDS)

    def _make_sync(self, source: Layout, target: WeightTarget, transport: Transport | None) -> WeightSync:
        context = self.model.context
        return WeightSync(
            source,
            target,
            rank=context.rank if context.split is None else context.split.rank,
            # An engine in another process has no tensors here that show the dtype.
            wire_dtype=self.dtype if target.streams or context.split is not None else None,
            max_staging_bytes=self.config.max_staging_bytes,
            attest=self.config.attest,
            device=self.model.device,
            transport=transport,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int],
        episodes: Episodes | None = None,
    ) -> list[Sample]:
        """``params.n`` samples of each prompt, in prompt order, on every rank of the model replica.

        Args:
            prompts: the same on every rank of the replica.
            seeds: one a prompt.
            episodes: each sample is one of these; those that are lost are left out.

        Raises:
            Abandoned: on every rank of this replica; other replicas do not know of it yet.
            EpisodeError: likewise.
        """
        missing, answers, fruitless = list(range(len(prompts))), dict[int, list[Any]](), 0
        while missing:
            started = time.perf_counter()
            own = self._generate_share(prompts, params, seeds, missing, episodes)
            self._work.append(WorkTime.since(started, "generate", "engine"))
            started = time.perf_counter()
            replies = self.model.context.gather_objects(own, "model")
            self._work.append(WorkTime.since(started, "other ranks generate", "waiting"))
            if signal := max(reply.gave_up for reply in replies):
                raise Abandoned(signal)
            new = {index: group for reply in replies for index, group in reply.answers.items()}
            answers |= new
            missing, fruitless = [index for index in missing if index not in answers], 0 if new else fruitless + 1
            if missing:
                lost = next(reply.lost for reply in replies if reply.lost)
                if fruitless == FRUITLESS_PUSHES:
                    raise RuntimeError(f"servers end {fruitless} times over before they have answered anything: {lost}")
                self._push_again(lost)
        merged = [answers[index] for index in range(len(prompts))]
        if episodes is not None:
            parts = [episodes.samples(prompts[group], found, group) for group, found in enumerate(merged)]
            return [sample for part in parts for sample in part]
        return [
            self.decode.sample(prompt, completion, group)
            for group, (prompt, completions) in enumerate(zip(prompts, merged, strict=True))
            for completion in completions
        ]

    def _generate_share(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int],
        wanted: Sequence[int],
        episodes: Episodes | None,
    ) -> _Reply:
        """The samples of this rank's share of the ``wanted`` prompts."""
        placement, engine, answers = self.placement, self.engine, dict[int, list[Any]]()
        for mine in filter(None, self._parts(len(prompts), wanted, params.n)):
            try:
                with abandonable(placement.tp == 1):
                    made = self._answers(engine, [prompts[i] for i in mine], params, [seeds[i] for i in mine], episodes)
            except Abandoned as abandoned:
                return _Reply({}, gave_up=abandoned.signal)
            except ServersLostError as error:
                return _Reply(answers | {mine[i]: group for i, group in error.answers.items()}, lost=str(error))
            if placement.tp_rank(self.model.context.rank) == 0:  # an engine may answer its first rank alone
                answers |= dict(zip(mine, made, strict=True))
        return _Reply(answers)

    def _parts(self, count: int, wanted: Sequence[int], n: int) -> Iterable[list[int]]:
        """What this rank's replica generates of the ``count`` prompts, one part after the other."""
        placement, rank = self.placement, self.model.context.rank
        if self.model.context.split is None:
            return [[i for i in placement.share(count, placement.replica(rank)) if i in set(wanted)]]
        return self._tickets.parts(wanted, max(1, self.config.max_running // n))

    @functools.cached_property
    def _tickets(self) -> Tickets:
        placement, context = self.placement, self.model.context
        assert context.split is not None
        replica, leads = placement.replica(context.rank), placement.tp_rank(context.rank) == 0
        return Tickets(context.split.store, replica, len(placement.replicas), leads)

    def _answers(
        self,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int],
        episodes: Episodes | None,
    ) -> Sequence[list[Any]]:
        if episodes is None:
            return engine.generate([prompt.token_ids for prompt in prompts], params, seeds)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos)}
        context = self.limits(params.max_tokens).context
        return episodes.play(engine, prompts, params, seeds, decode=self.decode, stop_token_ids=stops, context=context)

    def _push_again(self, why: str) -> None:
        """Push the newest weights again to servers that lost them during a generate call. Only the ranks of this model
        replica take part: they hold all weights, unless experts are distributed over data-parallel ranks.

        Raises:
            RuntimeError: these ranks do not hold all weights.
        """
        if self.model.context.split is not None:
            raise RuntimeError(
                f"{why}, and the training ranks, which alone hold weights, work on the next step: start more servers "
                f"for each replica with actor.rollout.options.servers, or resume from the last checkpoint"
            )
        ranks = self.placement.ranks
        logger.warning("weights version %s are pushed again: %s", self._served_version, why)
        if self._replica_sync is None:
            source, target = within(self.model.layout, ranks), TargetAs(self.engine, within(self.engine.layout, ranks))
            self._replica_sync = self._make_sync(source, target, self._replica_transport())
        try:
            self._replica_sync.push(self.model.published(), self.trained_version)
        except ValueError as error:
            raise RuntimeError(
                f"{why}, and the ranks that share its prompts do not hold all weights ({error}): start more servers "
                f"for each replica with actor.rollout.options.servers, or resume from the last checkpoint"
            ) from None

    def verify_weights(self) -> WeightCheck:
        """Check that all engines still hold the pushed weights, and that the training weights are still those, unless
        newer ones are known; collective over all ranks."""
        if self._served_version is None:
            return WeightCheck()
        rank = self.model.context.rank
        own = WeightCheck()  # of training ranks whose engines are elsewhere
        if self.model.context.split is None or self.model.context.split.on_rollout:
            own = self._verify_here() if self.engine.targets() else self.engine.verify_weights()
        faults = list(own.faults)
        if self._served_version == self.trained_version and (changed := self._changed()):
            faults.append(
                f"training rank {rank} holds other weights than version {self._served_version} that was pushed, for "
                f"example {min(changed)}: they were changed outside of Actor, and the next sample pushes them"
            )
        checks = self.model.context.gather_objects((own.compared, faults))
        return WeightCheck(sum(compared for compared, _ in checks), tuple(fault for _, f in checks for fault in f))

    def _verify_here(self) -> WeightCheck:
        """`verify_weights` of an engine in this process; each replica is counted once."""
        found = self._sync.verify() if self._sync is not None else None
        if found is None:
            return WeightCheck()
        rank = self.model.context.rank
        named = tuple(f"the engine on rank {rank} no longer holds what was pushed: {fault}" for fault in found)
        return WeightCheck(int(self.placement.tp_rank(rank) == 0), named)

    def after_sampling(self) -> None:
        """With ``sleep_while_training``, put the engine to sleep until the next push; it loses its weights."""
        if self.config.sleep_while_training and not self._asleep and self.model.context.split is None:
            self.engine.sleep()
            self._served_version, self._asleep = None, True

    def take_work(self) -> list[WorkTime]:
        """When this rank's engine worked, and when it waited for others, since the last call."""
        work, self._work = self._work, []
        return work

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs for the same seeds and versions."""
        return {"trained_version": self.trained_version, "calls": self.seeds.calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` returned; the engine's weights are outdated from then on."""
        self.trained_version, self.seeds.calls = state["trained_version"], state["calls"]
        self._served_version = None

    def close(self) -> None:
        """Release the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
