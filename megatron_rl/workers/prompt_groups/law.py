"""`Law`: which groups may be sampled, from which weights, and which a training step takes. Two laws:

`BatchLaw`: the groups of step j are sampled from version max(0, j - lag), all of them, and trained on together. What a
run samples does not depend on time.

`WindowedLaw`: groups are sampled all the time, across pushes, and a step takes finished ones, the oldest first: at
most a window ahead of the oldest that is not finished, so that a slow one holds up nobody, and long answers are not
put off for ever. No token is more than ``lag`` versions old when it is trained on: an older group is drawn again.

A law is a function of the groups in the buffer, in the order of their tickets. The window is that of Forge (MiniMax
M2.5, "windowed FIFO"); what may be started is AReaL's rule (arXiv 2505.24298, section 5.1) with positions in the buffer
for its counts, as filters may drop groups.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_rl.workers.prompt_groups.group import Group, Stage

LawName = Literal["batch", "windowed"]


class Demand(NamedTuple):
    """Prompts that should be drawn now."""

    num_prompts: int
    batch: int = 0
    round: int = 0


class Choice(NamedTuple):
    """What a training step takes out of the buffer."""

    trained: list[Group]
    unused: list[Group]  # leave the buffer too: filtered out, or more than the step has a place for


class Law(ABC):
    """See the module."""

    @abstractmethod
    def demand(self, groups: Sequence[Group], num_batches: int, version: int) -> Demand | None:
        """What to draw now.

        Args:
            num_batches: of which prompts were drawn already.
            version: of the weights that the engines serve.
        """

    @abstractmethod
    def may_start(self, group: Group, position: int, version: int, next_step: int) -> bool:
        """Whether a waiting group may be sampled from ``version``.

        Args:
            position: number of groups in the buffer that were drawn before it.
            next_step: the version of the weights that the next step will train.
        """

    @abstractmethod
    def may_push(self, groups: Sequence[Group], num_batches: int, version: int) -> bool:
        """Whether engines that serve ``version`` may go on with newer weights."""

    @abstractmethod
    def expired(self, group: Group, version: int) -> bool:
        """Whether a group that is in flight or finished is too old to be trained on by weights of ``version``."""

    @abstractmethod
    def discards(self, group: Group) -> bool:
        """Whether a group that has just finished leaves the buffer at once."""

    @abstractmethod
    def choose(self, groups: Sequence[Group]) -> Choice | None:
        """The groups of the next training step; None: not enough are finished."""


@dataclass(frozen=True, slots=True)
class BatchLaw(Law):
    """Whole batches, each from one version."""

    num_groups: int  # of a step
    lag: int = 0  # versions
    max_rounds: int = 1  # of sampling, where a filter drops groups
    min_groups: int = 1  # of a step, with dropped ones if need be: so that no data-parallel rank is without work

    def version_of(self, batch: int) -> int:
        """Of the weights that ``batch`` is sampled from."""
        return max(0, batch - self.lag)

    def demand(self, groups: Sequence[Group], num_batches: int, version: int) -> Demand | None:
        if any(group.stage is not Stage.FINISHED for group in groups):
            return None
        newest = [group for group in groups if group.batch == num_batches - 1]
        if newest and not self._complete(newest):
            return Demand(self.num_groups, num_batches - 1, newest[-1].round + 1)
        return Demand(self.num_groups, num_batches) if version == self.version_of(num_batches) else None

    def may_start(self, group: Group, position: int, version: int, next_step: int) -> bool:
        return version >= self.version_of(group.batch)  # later: a resumed run has lost it, and that version too

    def may_push(self, groups: Sequence[Group], num_batches: int, version: int) -> bool:
        finished = all(group.stage is Stage.FINISHED for group in groups)
        return finished and self.demand(groups, num_batches, version) is None

    def expired(self, group: Group, version: int) -> bool:
        return False  # sampling waits for training, so none can be

    def discards(self, group: Group) -> bool:
        return False  # whether a batch is complete depends on the dropped ones too

    def choose(self, groups: Sequence[Group]) -> Choice | None:
        batch = [group for group in groups if group.batch == groups[0].batch]
        if not batch or not self._complete(batch):
            return None
        kept = [group for group in batch if group.kept][: self.num_groups]
        spare = [group for group in batch if not group.kept][: max(0, self.min_groups - len(kept))]
        trained = {group.ticket for group in kept + spare}
        return Choice(kept + spare, [group for group in batch if group.ticket not in trained])

    def _complete(self, batch: Sequence[Group]) -> bool:
        finished = all(group.stage is Stage.FINISHED for group in batch)
        enough = sum(group.kept for group in batch) >= self.num_groups
        return finished and (enough or batch[-1].round + 1 >= self.max_rounds)


@dataclass(frozen=True, slots=True)
class WindowedLaw(Law):
    """Groups as they finish, first in, first out within a window.

    Raises:
        ValueError: the buffer holds less than a step takes.
    """

    num_groups: int  # of a step
    lag: int  # versions between the oldest token and the weights that are trained
    capacity: int  # groups in the buffer
    window: float = 0.3  # of the capacity

    def __post_init__(self) -> None:
        if not 1 <= self.num_groups <= self.capacity:
            raise ValueError(f"a buffer of {self.capacity} groups never holds the {self.num_groups} of a step")

    @property
    def window_groups(self) -> int:
        """Tickets of the window."""
        return max(1, math.ceil(self.window * self.capacity))

    def demand(self, groups: Sequence[Group], num_batches: int, version: int) -> Demand | None:
        missing = self.capacity - len(groups)
        return Demand(missing, num_batches) if missing > 0 else None

    def may_start(self, group: Group, position: int, version: int, next_step: int) -> bool:
        """Not if steps that may still use it will be full of earlier ones: it would only grow too old."""
        return position < (version + self.lag + 1 - next_step) * self.num_groups

    def may_push(self, groups: Sequence[Group], num_batches: int, version: int) -> bool:
        return True

    def expired(self, group: Group, version: int) -> bool:
        return group.version < version - self.lag

    def discards(self, group: Group) -> bool:
        return not group.kept  # others take its place, or a buffer full of them would be the end

    def choose(self, groups: Sequence[Group]) -> Choice | None:
        left, trained = list(groups), list[Group]()
        while len(trained) < self.num_groups:
            head = left[0].ticket if left else 0
            found = next((group for group in left if group.stage is Stage.FINISHED), None)
            if found is None or found.ticket >= head + self.window_groups:
                return None
            left.remove(found)
            trained.append(found)
        return Choice(trained, [])
