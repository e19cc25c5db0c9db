"""`GroupBuffer`: the groups of a run that are waiting, in flight or finished, and how they move from one to the next.

    buffer.add(prompts)                    as many as buffer.demand(version) says
    group = buffer.start(version)          the next one for an engine that serves ``version``
    buffer.finish(group.ticket, samples)   sampled and scored
    buffer.expire(version)                 after a push: what is too old is waiting again
    buffer.take(version)                   what training by weights of ``version`` goes on with

It does nothing by itself and knows no time: the `Law` decides, and whoever holds the buffer runs engines and rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_rl.batch import Prompt, Sample
from megatron_rl.workers.prompt_groups.group import Group, Stage, oldest_version
from megatron_rl.workers.prompt_groups.law import Demand, Law


class Taken(NamedTuple):
    """The groups of one training step, and what it cost to have them."""

    groups: list[Group]
    staleness: list[int]  # of each group: versions between its oldest token and the weights that train on it
    num_filtered: int  # groups that the algorithm's filter dropped since the last step
    num_unused: int  # good ones that the step had no place for
    num_redrawn: int  # given up as too old since the last step


class GroupBuffer:
    """See the module.

    Args:
        law: decides what is drawn, started, too old, and taken.

    Attributes:
        groups: those in the buffer by ticket, in the order of tickets.
    """

    def __init__(self, law: Law) -> None:
        self.law = law
        self.groups: dict[int, Group] = {}
        self._num_tickets = 0
        self._num_batches = 0  # of which prompts were drawn
        self._next_step = 0  # version of the weights that the next step trains
        self._num_redrawn = 0  # since the last step
        self._num_filtered = 0  # since the last step

    def count(self, stage: Stage) -> int:
        """Number of groups in ``stage``."""
        return sum(group.stage is stage for group in self.groups.values())

    def demand(self, version: int) -> Demand | None:
        """How many prompts should be added now, where engines serve ``version``; None: none."""
        return self.law.demand(self._in_order(), self._num_batches, version)

    def may_push(self, version: int) -> bool:
        """Whether engines that serve ``version`` have sampled all that is to be sampled from it."""
        return self.law.may_push(self._in_order(), self._num_batches, version)

    def add(self, prompts: Sequence[Prompt], demand: Demand) -> list[Group]:
        """Put the drawn prompts at the end of the queue."""
        added = []
        for prompt in prompts:
            group = Group(self._num_tickets, prompt, demand.batch, demand.round)
            self._num_tickets += 1
            self.groups[group.ticket] = group
            added.append(group)
        self._num_batches = max(self._num_batches, demand.batch + 1)
        return added

    def start(self, version: int) -> Group | None:
        """The waiting group with the lowest ticket, in flight from now on; None where none may be started."""
        for position, group in enumerate(self.groups.values()):
            if group.stage is Stage.WAITING and self.law.may_start(group, position, version, self._next_step):
                group.stage, group.version = Stage.IN_FLIGHT, version
                return group
        return None

    def finish(self, ticket: int, draw: int, samples: Sequence[Sample], kept: bool = True) -> bool:
        """The samples of a group in flight; False for those of a draw that was given up: they are forgotten.

        Raises:
            ValueError: no such group was in flight.
        """
        group = self.groups.get(ticket)
        if ticket < self._num_tickets and (group is None or draw < group.draw):
            return False
        if group is None or group.stage is not Stage.IN_FLIGHT or draw != group.draw:
            state = "unknown" if group is None else f"{group.stage.value}, draw {group.draw}"
            raise ValueError(f"group {ticket}, draw {draw}, was finished, but it is {state}")
        group.stage, group.samples, group.kept = Stage.FINISHED, list(samples), kept
        group.version = min(group.version, oldest_version(samples)) if samples else group.version
        if self.law.discards(group):
            del self.groups[ticket]
            self._num_filtered += 1
        return True

    def expire(self, version: int) -> list[Group]:
        """Put every group that is too old for weights of ``version`` back among the waiting, to be drawn again.
        Returned are those that were in flight, as they were: their sampling should be aborted."""
        aborted = []
        for ticket, group in list(self.groups.items()):
            if group.stage is not Stage.WAITING and self.law.expired(group, version):
                if group.stage is Stage.IN_FLIGHT:
                    aborted.append(group)
                self.groups[ticket] = Group(ticket, group.prompt, group.batch, group.round, group.draw + 1)
                self._num_redrawn += 1
        return aborted

    def take(self, version: int) -> Taken | None:
        """The groups that weights of ``version`` are trained on; None until enough of them are finished."""
        self.expire(version)
        choice = self.law.choose(self._in_order()) if self.groups else None
        if choice is None:
            return None
        self._next_step = version + 1
        for group in (*choice.trained, *choice.unused):
            del self.groups[group.ticket]
        filtered = self._num_filtered + sum(not group.kept for group in choice.unused)
        unused = sum(group.kept for group in choice.unused)
        staleness = [version - group.version for group in choice.trained]
        taken = Taken(choice.trained, staleness, filtered, unused, self._num_redrawn)
        self._num_filtered = self._num_redrawn = 0
        return taken

    def _in_order(self) -> list[Group]:
        return list(self.groups.values())
