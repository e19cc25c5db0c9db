"""`Rollouts`: what an actor generates: which rank answers which prompts, and how the samples come to all who train.

The ranks of a model replica divide the prompts of their data-parallel rank among their rollout replicas (`LazyEngine`)
and exchange the finished samples. Where the job has rollout ranks, these share all prompts, as one such replica.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.batch.work_time import WorkTime
from megatron_rl.data import Limits
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.parallel.abandon import Abandoned, abandonable
from megatron_rl.rollout.base import RolloutEngine, SamplingParams, ServersLostError
from megatron_rl.rollout.placement import RolloutPlacement
from megatron_rl.workers.actor_config import RolloutConfig
from megatron_rl.workers.episodes import Episodes
from megatron_rl.workers.lazy_engine import LazyEngine
from megatron_rl.workers.prompt_groups.groups_in_flight import GroupsInFlight
from megatron_rl.workers.prompt_seeds import PromptSeeds
from megatron_rl.workers.response_text import ResponseDecoder
from megatron_rl.workers.served_weights import ServedWeights
from megatron_rl.workers.tickets import Tickets

FRUITLESS_PUSHES = 3  # of weights that servers lose again before they have answered anything; they die of the requests


class _Reply(NamedTuple):
    """One rank's result of a generate call, for the other ranks of its model replica."""

    answers: dict[int, list[Any]]  # completions or episodes, by index of the prompt; on a rollout replica's first rank
    lost: str = ""  # the error of servers that have lost their weights
    gave_up: int = 0  # the signal that ended the call


class Rollouts:
    """One rank's generation.

    Attributes:
        weights: those that its engine serves.
        seeds: what the samples are drawn with.
        in_flight: under the windowed law, from the first step on: groups that are drawn and not taken.
    """

    def __init__(
        self,
        model: TrainingEngine,
        tokenizer: Any,
        eos: tuple[int, ...],
        config: RolloutConfig,
        seed: int,
        engine: RolloutEngine | None,
    ) -> None:
        self.model = model
        self.eos = eos
        self.decode = ResponseDecoder(tokenizer, {*eos, tokenizer.pad_token_id}, config.special_tokens)
        self.config = config
        self.seeds = PromptSeeds(seed, model.context)
        self._engine = LazyEngine(model, tokenizer, eos, config, engine)
        self.weights = ServedWeights(model, self._engine, config)
        self.in_flight: GroupsInFlight | None = None
        self._work: list[WorkTime] = []  # since `take_work`

    @property
    def engine(self) -> RolloutEngine:
        """The engine, built on first use."""
        return self._engine.get()

    @property
    def placement(self) -> RolloutPlacement:
        """The rollout replicas among the ranks of this rank's model replica."""
        return self._engine.placement

    def limits(self, max_tokens: int) -> Limits:
        """Vocabulary and length limits of prompts whose responses may have ``max_tokens``."""
        return self._engine.limits(max_tokens)

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
                self.weights.push_again(lost)
        merged = [answers[index] for index in range(len(prompts))]
        if episodes is not None:
            parts = [episodes.samples(prompts[group], found, group) for group, found in enumerate(merged)]
            return [sample for part in parts for sample in part]
        return [
            self.decode.sample(prompt, completion, group)
            for group, (prompt, completions) in enumerate(zip(prompts, merged, strict=True))
            for completion in completions
        ]

    def take_finished(self, batch: Batch, params: SamplingParams, lag: int) -> None:
        """Draw the batch's prompts, and put the finished groups of a step in their place (law *windowed*). The first
        batch of a run has the prompts of ``lag`` more steps, which stay in flight. Collective.

        Raises:
            Abandoned, PeerError, RuntimeError: as `GroupsInFlight.step`.
        """
        seeds = self.seeds.training(batch.prompts)
        if self.in_flight is None:
            self.in_flight = GroupsInFlight(
                self.engine,
                self.placement,
                self.model.context,
                lambda prompt, completions: [self.decode.sample(prompt, completion, 0) for completion in completions],
                num_groups=len(batch.prompts) // (lag + 1),
                lag=lag,
                params=params,
            )
        taken, metrics = self.in_flight.step(batch.prompts, seeds)
        batch.prompts = [group.prompt for group in taken.groups]
        batch.samples = [replace(sample, group=i) for i, group in enumerate(taken.groups) for sample in group.samples]
        batch.metrics |= metrics

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

    def after_sampling(self) -> None:
        """With ``sleep_while_training``, put the engine to sleep until the next push; it loses its weights."""
        if self.config.sleep_while_training and self.model.context.split is None:
            self.weights.sleep()

    def take_work(self) -> list[WorkTime]:
        """When this rank's engine worked, and when it waited for others, since the last call."""
        work, self._work = self._work, []
        return work

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs for the same seeds and versions."""
        return {"trained_version": self.weights.trained_version, "calls": self.seeds.calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` returned; the engine's weights are outdated from then on."""
        self.weights.resume_at(state["trained_version"])
        self.seeds.calls = state["calls"]

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()
