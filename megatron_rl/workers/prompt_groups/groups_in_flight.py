"""`GroupsInFlight`: the windowed law at work: engines go on with groups while a step is trained and weights are pushed.

Every rollout rank holds the same `GroupBuffer`. The first rank of each rollout replica runs the groups that fell to its
replica; what has finished is exchanged every `POLL_SECONDS` while a step waits, so that all ranks decide alike.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from megatron_rl.batch import Prompt, Sample
from megatron_rl.parallel import ParallelContext
from megatron_rl.parallel.abandon import abandonable
from megatron_rl.rollout.base import Completion, RolloutEngine, SamplingParams
from megatron_rl.rollout.placement import RolloutPlacement
from megatron_rl.workers.prompt_groups.group import Group, Stage
from megatron_rl.workers.prompt_groups.group_buffer import GroupBuffer, Taken
from megatron_rl.workers.prompt_groups.law import Demand, WindowedLaw

POLL_SECONDS = 0.05

Draw = tuple[int, int]  # ticket of a group, and how often it was drawn before
MakeSamples = Callable[[Prompt, Sequence[Completion]], list[Sample]]


class GroupsInFlight:
    """One rollout rank's view; all of them call its methods together, with the same arguments.

    Args:
        placement: of the rollout replicas among the ranks of ``context``.
        num_groups: of a training step.
        lag: steps that a group's oldest token may be behind the weights that train on it.
        params: of every group.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        placement: RolloutPlacement,
        context: ParallelContext,
        make_samples: MakeSamples,
        *,
        num_groups: int,
        lag: int,
        params: SamplingParams,
    ) -> None:
        self._engine, self._placement, self._make_samples, self._params = engine, placement, make_samples, params
        self._context, self._agreement = context, context.agreement
        self._buffer = GroupBuffer(WindowedLaw(num_groups, lag, capacity=(lag + 1) * num_groups))
        self._steps = 0  # taken so far: the versions of the buffer, whatever number the weights have
        self._served = 0  # of these, the one that engines serve
        self._seeds: dict[int, int] = {}  # by ticket
        self._replicas: dict[int, int] = {}  # by ticket: which one runs the group
        self._running: dict[Draw, Future[list[Completion]]] = {}  # on this rank
        self._idle_since: float | None = None  # the last answer of this rank's engine came then
        self._idle_s = 0.0  # that it had nothing to do, since the last step

    @property
    def prompts(self) -> list[Prompt]:
        """Of the groups in the buffer, in the order in which they were drawn."""
        return [group.prompt for group in self._buffer.groups.values()]

    def step(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> tuple[Taken, dict[str, float]]:
        """Draw ``prompts``, and take the groups of the next training step as soon as enough are finished. Collective.

        Args:
            seeds: one a prompt.

        Returns:
            The groups with their samples, and ``rollout/...`` metrics.

        Raises:
            Abandoned: on every rank.
            PeerError, RuntimeError: an engine failed.
        """
        started, self._served = time.perf_counter(), self._steps
        for group, seed in zip(self._buffer.add(prompts, Demand(len(prompts))), seeds, strict=True):
            self._seeds[group.ticket] = seed
        for group in self._buffer.expire(self._steps):
            self._forget(group)
        self._exchange(0.0)  # what has finished while the last step was trained
        while (taken := self._buffer.take(self._steps)) is None:
            self.start()
            self._exchange(POLL_SECONDS)
        self._steps += 1
        for group in taken.groups:
            del self._seeds[group.ticket], self._replicas[group.ticket]
        depth = Counter(group.stage for group in self._buffer.groups.values())
        idle, self._idle_s = self._idle_s, 0.0
        return taken, {
            "rollout/groups_in_flight": float(depth[Stage.IN_FLIGHT]),
            "rollout/groups_finished": float(depth[Stage.FINISHED]),
            "rollout/groups_redrawn": float(taken.num_redrawn),
            "time/engine_idle_s": idle,
            "time/wait_for_groups_s": time.perf_counter() - started,
        }

    def start(self) -> None:
        """Give the engines what waits; after each `step` too, so that they have work while it is trained. Collective.

        Raises:
            PeerError, RuntimeError: an engine does not take it.
        """
        begun: list[Group] = []
        while (group := self._buffer.start(self._served)) is not None:
            self._replicas[group.ticket] = self._least_busy()
            begun.append(group)
        if begun:
            self._submit(begun)

    def _submit(self, begun: Sequence[Group]) -> None:
        placement, rank = self._placement, self._context.rank
        own = [group for group in begun if self._replicas[group.ticket] == placement.replica(rank)]
        with self._agreement.attempt("actor.sample"):
            if self._idle_since is not None and all(future.done() for future in self._running.values()):
                self._idle_s += time.perf_counter() - self._idle_since
            prompts = [group.prompt.token_ids for group in own]
            futures = self._engine.submit(prompts, self._params, [self._seeds[group.ticket] for group in own])
            if placement.tp_rank(rank) == 0:  # an engine may answer its first rank alone
                for group, future in zip(own, futures, strict=True):
                    self._running[group.ticket, group.draw] = future
                    future.add_done_callback(self._note_end)

    def _note_end(self, future: Future[list[Completion]]) -> None:
        self._idle_since = time.perf_counter()

    def _least_busy(self) -> int:
        """The replica with the fewest groups in flight."""
        groups = self._buffer.groups.values()
        running = [group.ticket for group in groups if group.stage is Stage.IN_FLIGHT]
        busy = Counter(self._replicas[ticket] for ticket in running if ticket in self._replicas)
        return min(range(len(self._placement.replicas)), key=lambda replica: (busy[replica], replica))

    def _forget(self, group: Group) -> None:
        """A draw that was given up: its replica stops working on it."""
        future = self._running.pop((group.ticket, group.draw), None)
        if future is not None:
            future.cancel()

    def _exchange(self, seconds: float) -> None:
        """Wait ``seconds`` at the most for groups of this rank, and learn what has finished anywhere."""
        with self._agreement.attempt("actor.sample"):
            with abandonable():
                if self._running:
                    wait(self._running.values(), seconds, FIRST_COMPLETED)
                else:
                    time.sleep(seconds)
            own = {draw: future.result() for draw, future in self._running.items() if future.done()}
        for draw in own:
            del self._running[draw]
        found = {draw: made for part in self._context.gather_objects(own) for draw, made in part.items()}
        for (ticket, number), completions in sorted(found.items()):
            group = self._buffer.groups.get(ticket)
            if group is not None:
                self._buffer.finish(ticket, number, self._make_samples(group.prompt, completions))
