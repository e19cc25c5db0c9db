"""`Selector`: measures the paths of one group, chooses one for each message, and tries them again when in doubt.

Calibration takes a few seconds, at the first message of each kind, unless an earlier run on the same topology left its
figures. Every rank measures; the slowest one counts, so all ranks choose alike. How messages fare afterwards is watched
size by size (`Watch`): a path that is not what it promised is left. Each choice is logged once for each power of two of
bytes.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import median

import torch

from megatron_rl.collectives.calibrations import Calibrations
from megatron_rl.collectives.cost_model import HIERARCHICAL, LIBRARY, SIZES, Choice, Cost, Sample, choose
from megatron_rl.collectives.watch import Trial, Watch, doubtful, is_wrong

logger = logging.getLogger(__name__)

ROUNDS, MOST_ROUNDS = 3, 9  # of each measurement; more than the least while they take no longer than
ENOUGH = 0.2  # seconds
QUICK = 0.1  # seconds of every path for a message of a calibration; then the next larger one is measured as well
MEASURE_EVERY = 16  # messages, of which the library's own are not timed otherwise
POWERS = 64  # of two: as many samples a path has at the most

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
        self._watches: defaultdict[int, Watch] = defaultdict(Watch)  # by power of two of bytes

    def next_number(self, num_bytes: int) -> int:
        """The number of the next message among those of its size; on the caller's thread, so that ranks count alike."""
        watch = self._watches[num_bytes.bit_length()]
        watch.count += 1
        return watch.count

    def leaves_alone(self, number: int, num_bytes: int) -> bool:
        """Whether message ``number`` is the library's and nothing is to be measured, told or agreed."""
        if self.deterministic or not self.costs or number % MEASURE_EVERY == 0:
            return False
        power = num_bytes.bit_length()
        if self._watches[power].looks(number) or self.now(num_bytes).path != LIBRARY:
            return False
        return not (self._talks and (LIBRARY, power) not in self._told)

    def now(self, num_bytes: int) -> Choice:
        """The path that is best for such a message by what is known so far."""
        if self.deterministic:
            return Choice(HIERARCHICAL, 0.0, 0.0)
        return choose(self.costs, num_bytes, self.minimum_gain)

    def choose(self, number: int, num_bytes: int) -> Choice:
        """The path of message ``number``; collective, as it may calibrate."""
        if self.deterministic:
            return self.now(num_bytes)
        if not self.costs:
            self._recall()
        if not self.costs:
            self.calibrate()
        watch = self._watches[num_bytes.bit_length()]
        if watch.trial is None and watch.looks(number):
            self._look(watch, number, num_bytes)
        if watch.trial is None:
            return self.now(num_bytes)
        self._largest(torch.zeros(1, dtype=torch.float64))
        path = watch.trial.path
        return Choice(path, self.costs[path].seconds(num_bytes), self.costs[LIBRARY].seconds(num_bytes))

    def measured(self, number: int, choice: Choice, num_bytes: int, seconds: float) -> None:
        """Take note of how long a message took; collective, as it may end a trial."""
        if self.deterministic:
            return
        watch, power = self._watches[num_bytes.bit_length()], num_bytes.bit_length()
        if watch.trial is not None:
            watch.trial.taken.append((num_bytes, seconds))
            if watch.trial.done:
                self._judge(watch, number, num_bytes)
            return
        if choice.predicted > 0:
            watch.ratios.append(seconds / choice.predicted)
        if self._talks and (choice.path, power) not in self._told:
            self._told.add((choice.path, power))
            logger.info("%s of %d bytes by %s; %.2f ms measured", self.name, num_bytes, choice, seconds * 1e3)

    def calibrate(self) -> None:
        """Measure every path at two sizes, on fast links at a third one; collective."""
        samples: dict[str, list[Sample]] = {path: [] for path in self._paths}
        for size in SIZES:
            figures = torch.tensor(self._probe(size), dtype=torch.float64)
            self._largest(figures)
            for path, seconds in zip(self._paths, figures.tolist(), strict=True):
                samples[path].append((size, seconds))
            if size > SIZES[0] and float(figures.max()) > QUICK:
                break
        self.costs = {path: Cost(tuple(found)) for path, found in samples.items()}
        self._told.clear()
        self.num_calibrations += 1
        self._keep("measured")

    def _look(self, watch: Watch, number: int, num_bytes: int) -> None:
        """Begin a trial where rank 0's last predictions leave a doubt; collective."""
        agreed = torch.tensor([watch.ratio()], dtype=torch.float64)
        self._agree(agreed)
        ratio, choice = float(agreed), self.now(num_bytes)
        in_doubt = doubtful(self.costs, choice, num_bytes, ratio, self.minimum_gain)
        if not watch.questions(number, choice, in_doubt):
            return
        if in_doubt and self._talks:
            logger.info(
                "%s of %d bytes by %s takes %.1f times what was predicted: the paths take turns",
                self.name, num_bytes, choice, ratio,
            )  # fmt: skip
        if is_wrong(ratio) and num_bytes >= SIZES[0]:
            self.calibrate()
        watch.trial = Trial(list(self._paths))

    def _judge(self, watch: Watch, number: int, num_bytes: int) -> None:
        """Learn from a trial; collective."""
        assert watch.trial is not None
        rates, before = torch.tensor(watch.trial.rates(), dtype=torch.float64), self.now(num_bytes)
        self._largest(rates)
        for path, rate in zip(self._paths, rates.tolist(), strict=True):
            self.costs[path] = self.costs[path].learned((num_bytes, rate * num_bytes))
        after = self.now(num_bytes)
        watch.ends_trial(number, changed=after.path != before.path)
        if self._talks and after.path != before.path:
            logger.info("%s of %d bytes by %s from now on, not by %s", self.name, num_bytes, after, before.path)
        self._keep("measured in turn")

    def _keep(self, source: str) -> None:
        if self._talks:
            self._log_costs(source)
            if self._calibrations is not None:
                self._calibrations.save(self.name, self.costs)

    def _recall(self) -> None:
        """Take the figures that rank 0 finds of an earlier run, if it does; collective."""
        if self._calibrations is None:
            return
        found = self._calibrations.load(self.name) if self._talks else None
        table = torch.full((len(self._paths), POWERS, 2), torch.nan, dtype=torch.float64)
        if found is not None and set(found) == set(self._paths):
            for row, path in zip(table, self._paths, strict=True):
                for num_bytes, seconds in found[path].samples:
                    row[num_bytes.bit_length()] = torch.tensor([num_bytes, seconds], dtype=torch.float64)
        self._agree(table)
        rows = [row[~row.isnan().any(1)].tolist() for row in table]
        if all(rows):
            samples = (tuple((int(num_bytes), seconds) for num_bytes, seconds in row) for row in rows)
            self.costs = dict(zip(self._paths, map(Cost, samples), strict=True))
            if self._talks:
                self._log_costs("known from an earlier run")

    def _log_costs(self, source: str) -> None:
        for path, cost in self.costs.items():
            figures = ", ".join(f"{size / 2**20:.3g} MB {seconds * 1e3:.2f} ms" for size, seconds in cost.samples)
            logger.info("%s by %s: %s; %s", self.name, path, figures, source)

    def _probe(self, size: int) -> list[float]:
        """Seconds of each path for a message of ``size`` bytes: in turn, so that all see the same load.

        All ranks begin together: rank 0 may be done while data that it sent is still under way, and the next path
        would wait for it.
        """
        runs = [prepare(size) for prepare in self._paths.values()]
        for run in runs:
            run()  # makes connections and memory
        times: list[list[float]] = [[] for _ in runs]
        began = time.perf_counter()
        for turn in range(MOST_ROUNDS):
            elapsed = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            self._largest(elapsed)
            if turn >= ROUNDS and float(elapsed) > ENOUGH:
                break
            for run, found in zip(runs, times, strict=True):
                self._largest(torch.zeros(1, dtype=torch.float64))
                started = time.perf_counter()
                run()
                found.append(time.perf_counter() - started)
        return [median(found) for found in times]
