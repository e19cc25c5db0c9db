"""`Watch`: how the messages of one size fare, and when the choice of their path is to be questioned.

A prediction can be wrong, or right for a network that has changed since. So a choice is looked at after 4 messages of
a size, 8 more, 16 more and so on; where it is in doubt, the next messages take the paths in turn (a `Trial`), and what
they took decides. All ranks hold equal watches: they change by the number of a message and by what ranks agreed on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from megatron_rl.collectives.cost_model import LIBRARY, Choice, Cost, Sample, fastest

FIRST_LOOK = 4  # messages of a size before the first look; as many again before the next one
LOOK_EVERY = 64  # messages between looks in the end,
LONGEST = 1024  # or where all doubts were in vain
TRIALS = 3  # messages of each path in a trial
WRONG_BY = 2.0  # measured over predicted (or the reverse) from which on nothing that was measured is believed


@dataclass
class Trial:
    """Messages that take the paths in turn, all ranks beginning each together."""

    paths: Sequence[str]
    taken: list[Sample] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Of the next message."""
        return self.paths[len(self.taken) % len(self.paths)]

    @property
    def done(self) -> bool:
        return len(self.taken) == TRIALS * len(self.paths)

    def rates(self) -> list[float]:
        """Seconds for each byte of each path, by this rank's clock."""
        by_path = [self.taken[k :: len(self.paths)] for k in range(len(self.paths))]
        return [median(seconds / num_bytes for num_bytes, seconds in taken) for taken in by_path]


@dataclass
class Watch:
    """Messages of one power of two of bytes."""

    count: int = 0  # begun so far, on the caller's thread
    next_look: int = FIRST_LOOK  # number of the message that looks
    trial: Trial | None = None
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=LOOK_EVERY))  # measured over predicted
    _interval: int = FIRST_LOOK
    _trial_due: int = 4 * FIRST_LOOK

    def looks(self, number: int) -> bool:
        """Whether message ``number`` is part of a trial, or may begin one."""
        return self.trial is not None or number >= self.next_look

    def ratio(self) -> float:
        """Measured over predicted since the last look, by this rank's clock."""
        return median(self.ratios) if self.ratios else 1.0

    def questions(self, number: int, choice: Choice, in_doubt: bool) -> bool:
        """Whether a look at message ``number`` begins a trial.

        A path other than the library's has to win one now and then: what the library would have taken is not seen
        otherwise.
        """
        self.ratios.clear()
        if not in_doubt and (choice.path == LIBRARY or number < self._trial_due):
            self._wait(number, LOOK_EVERY)
            return False
        return True

    def ends_trial(self, number: int, changed: bool) -> None:
        """Look again soon when the choice changed, else after twice as many messages as before."""
        self.trial = None
        if changed:
            self._interval = FIRST_LOOK
        self._wait(number, LONGEST)
        self._trial_due = number + min(LONGEST, number)

    def _wait(self, number: int, longest: int) -> None:
        self._interval = min(2 * self._interval, longest)
        self.next_look = number + self._interval


def doubtful(costs: dict[str, Cost], choice: Choice, num_bytes: int, ratio: float, minimum_gain: float) -> bool:
    """Whether ``choice`` would not be taken if it cost ``ratio`` times what was predicted, or that is far off."""
    seconds = {path: cost.seconds(num_bytes) for path, cost in costs.items()}
    seconds[choice.path] *= ratio
    return is_wrong(ratio) or fastest(seconds, minimum_gain) != choice.path


def is_wrong(ratio: float) -> bool:
    return not 1 / WRONG_BY < ratio < WRONG_BY
