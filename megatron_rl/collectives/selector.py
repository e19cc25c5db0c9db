"""`Selector`: measures the paths of one group, chooses one for each message, and measures again when it was wrong.

Calibration takes a few seconds, at the first message of each kind, unless an earlier run on the same topology left its
figures. Every rank measures; the slowest one counts, so all ranks choose alike. Each choice is logged once for each
power of two of bytes.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import astuple
from statistics import median

import torch

from megatron_rl.collectives.calibrations import Calibrations
from megatron_rl.collectives.cost_model import HIERARCHICAL, LIBRARY, SIZES, Choice, Cost, choose

logger = logging.getLogger(__name__)

ROUNDS = 3  # of each measurement; the fastest counts
CHECK_EVERY = 64  # messages between two looks at how good the predictions were
MEASURE_EVERY = 16  # messages, of which the library's own are not timed otherwise
WRONG_BY = 2.0  # measured over predicted (or the reverse) from which on the paths are measured again

Prepare = Callable[[int], Callable[[], None]]  # for so many bytes, what moves a message of them


class Selector:
    """One kind of collective (``all_reduce`` ..) of one group.

    Args:
        name: of the kind, for the log.
        paths: prepares a probe of each path, by its name in `cost_model`.
        agree: rank 0's fp64 tensor on all ranks, in place; collective.
        largest: the largest of all ranks' fp64 tensors on all ranks, in place; collective, and a barrier.
        talks: whether this rank writes to the log, and to ``calibrations``.
        calibrations: figures of earlier runs, kept for later ones; None measures in every run.
    """

    def __init__(
        self,
        name: str,
        paths: Mapping[str, Prepare],
        agree: Callable[[torch.Tensor], None],
        largest: Callable[[torch.Tensor], None],
        *,
        minimum_gain: float,
        deterministic: bool,
        talks: bool,
        calibrations: Calibrations | None = None,
    ) -> None:
        self.name, self.minimum_gain, self.deterministic = name, minimum_gain, deterministic
        self.costs: dict[str, Cost] = {}
        self.num_calibrations = 0
        self._paths, self._agree, self._largest = paths, agree, largest
        self._talks, self._calibrations = talks, calibrations
        self._told: set[tuple[str, int]] = set()
        self._ratios: deque[float] = deque(maxlen=CHECK_EVERY)
        self._count = 0

    def next_number(self) -> int:
        """The number of the next message; on the caller's thread, so that ranks count alike."""
        self._count += 1
        return self._count

    def leaves_alone(self, number: int, num_bytes: int) -> bool:
        """Whether message ``number`` is the library's and nothing is to be measured, told or agreed."""
        if self.deterministic or not self.costs or number % MEASURE_EVERY == 0:
            return False
        path = choose(self.costs, num_bytes, self.minimum_gain).path
        return path == LIBRARY and not (self._talks and (path, num_bytes.bit_length()) not in self._told)

    def choose(self, number: int, num_bytes: int) -> Choice:
        """The path of message ``number``; collective, as it may calibrate."""
        if self.deterministic:
            return Choice(HIERARCHICAL, 0.0, 0.0)
        if not self.costs:
            self._recall()
        if not self.costs or (number % CHECK_EVERY == 0 and self._were_wrong()):
            self.calibrate()
        return choose(self.costs, num_bytes, self.minimum_gain)

    def measured(self, choice: Choice, num_bytes: int, seconds: float) -> None:
        """Take note of how long a message took."""
        if choice.predicted > 0 and num_bytes >= SIZES[0]:
            self._ratios.append(seconds / choice.predicted)
        power = num_bytes.bit_length()
        if self._talks and (choice.path, power) not in self._told:
            self._told.add((choice.path, power))
            logger.info("%s of %d bytes by %s; %.2f ms measured", self.name, num_bytes, choice, seconds * 1e3)

    def calibrate(self) -> None:
        """Measure every path at both sizes; collective."""
        figures = torch.tensor([self._probe(size) for size in SIZES], dtype=torch.float64).T.contiguous()
        self._largest(figures)
        rows = zip(self._paths, figures.tolist(), strict=True)
        self.costs = {path: Cost.fitted(list(zip(SIZES, row, strict=True))) for path, row in rows}
        self._ratios.clear()
        self._told.clear()
        self.num_calibrations += 1
        if self._talks:
            self._log_costs("measured")
            if self._calibrations is not None:
                self._calibrations.save(self.name, self.costs)

    def _recall(self) -> None:
        """Take the figures that rank 0 finds of an earlier run, if it does; collective."""
        if self._calibrations is None:
            return
        found = self._calibrations.load(self.name) if self._talks else None
        if found is None or set(found) != set(self._paths):
            found = dict.fromkeys(self._paths, Cost(math.nan, math.nan))
        figures = torch.tensor([astuple(found[path]) for path in self._paths], dtype=torch.float64)
        self._agree(figures)
        if not figures.isnan().any():
            self.costs = {path: Cost(*row) for path, row in zip(self._paths, figures.tolist(), strict=True)}
            if self._talks:
                self._log_costs("known from an earlier run")

    def _log_costs(self, source: str) -> None:
        for path, cost in self.costs.items():
            rate = 1e-6 / cost.seconds_per_byte if cost.seconds_per_byte else float("inf")
            logger.info("%s by %s: %.2f ms + bytes / %.0f MB/s, %s", self.name, path, cost.latency * 1e3, rate, source)

    def _were_wrong(self) -> bool:
        """Whether rank 0's last predictions were off; collective."""
        ratio = torch.tensor([median(self._ratios) if self._ratios else 1.0], dtype=torch.float64)
        self._agree(ratio)
        wrong = not 1 / WRONG_BY < float(ratio) < WRONG_BY
        if wrong and self._talks:
            logger.warning("%s takes %.1f times the predicted time: measuring the paths again", self.name, float(ratio))
        return wrong

    def _probe(self, size: int) -> list[float]:
        """Seconds of each path for a message of ``size`` bytes: in turn, so that all see the same load.

        All ranks begin together: rank 0 may be done while data that it sent is still under way, and the next path
        would wait for it.
        """
        runs = [prepare(size) for prepare in self._paths.values()]
        for run in runs:
            run()  # makes connections and memory
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(ROUNDS):
            for run, found in zip(runs, times, strict=True):
                self._largest(torch.zeros(1, dtype=torch.float64))
                started = time.perf_counter()
                run()
                found.append(time.perf_counter() - started)
        return [min(found) for found in times]
