"""`forecast_lag`: step time, waiting and staleness of a run with rollout ranks, before there is one.

A discrete-event simulation: engines with slots, answers whose lengths are drawn, a training half, pushes between
them. Which groups are started, waited for, given up and trained on is decided by the laws of
`workers.prompt_groups.law`, on a real `GroupBuffer`; only time is simulated.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import Field

from megatron_rl.batch import Prompt
from megatron_rl.config import ConfigRecord
from megatron_rl.config.ranges import Positive, Seed
from megatron_rl.workers.prompt_groups.group import Group, Stage
from megatron_rl.workers.prompt_groups.group_buffer import GroupBuffer
from megatron_rl.workers.prompt_groups.law import BatchLaw, Law, WindowedLaw


class Timing(ConfigRecord):
    """What a run's times depend on."""

    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts of a training step."""
    samples_per_prompt: int = Field(default=8, ge=1)
    """Answers to each prompt; together they are a group."""
    replicas: int = Field(default=1, ge=1)
    """Rollout engines."""
    slots: int = Field(default=8, ge=1)
    """Answers that an engine generates at once."""
    token_s: float = Field(default=0.02, gt=0)
    """Seconds of a decoding step, which gives each running answer a token."""
    token_s_per_running: float = Field(default=0.0, ge=0)
    """Seconds by which each running answer lengthens a decoding step."""
    sample_s: float = Field(default=0.0, ge=0)
    """Seconds that an answer takes beside its tokens: the prompt, a request."""
    tokens_mean: float = Field(default=256.0, gt=0)
    """Mean length of an answer, before `tokens_max` cuts it."""
    tokens_sigma: float = Field(default=0.0, ge=0)
    """Lengths are lognormal: standard deviation of their logarithm; 0 = all have `tokens_mean`."""
    tokens_max: int | None = Field(default=None, ge=1)
    """Longest answer; None = no limit."""
    lengths: tuple[Positive, ...] = ()
    """Measured lengths of answers, in tokens, to draw from in place of a distribution."""
    reward_s: float = Field(default=0.0, ge=0)
    """Seconds from a group's last token to its rewards."""
    training_s: float = Field(default=10.0, ge=0)
    """Seconds of the training half of a step."""
    push_s: float = Field(default=1.0, ge=0)
    """Seconds of a push, in which neither half works."""
    num_steps: int = Field(default=100, ge=4)
    """Steps to simulate."""
    seed: Seed = 0
    """Of the lengths."""

    def length(self, rng: random.Random) -> float:
        """Tokens of an answer."""
        drawn = self.tokens_mean
        if self.lengths:
            drawn = rng.choice(self.lengths)
        elif self.tokens_sigma:
            mu = math.log(self.tokens_mean) - self.tokens_sigma**2 / 2
            drawn = rng.lognormvariate(mu, self.tokens_sigma)
        return min(drawn, self.tokens_max or drawn)


@dataclass(frozen=True)
class LawForecast:
    """One law's run, its first steps left out."""

    law: str  # in turns, batch or windowed
    lag: int
    step_s: float
    training_wait_share: float  # of the time: training has nothing to do; pushes included
    engine_wait_share: float  # of the time: an engine runs no answer, mean over engines
    slots_share: float  # of the slots in use, mean over time
    staleness_mean: float  # versions
    staleness_max: int
    redrawn_share: float  # groups given up as too old for each one trained on
    finished_mean: float  # groups that wait for training when it takes a batch


@dataclass(frozen=True)
class LagForecast:
    """Written by `forecast_lag`."""

    bound_s: float  # no law can take less: the busier half with all slots in use, and a push
    laws: tuple[LawForecast, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "bound_s": self.bound_s,
            "laws": [asdict(law) | {"ratio_to_bound": law.step_s / self.bound_s} for law in self.laws],
        }

    def __str__(self) -> str:
        lines = [f"bound {self.bound_s:.4g} s a step: the busier half with all slots in use, and a push", ""]
        lines.append("law       lag  step s  to bound  training waits  engines wait  slots  staleness  redrawn")
        lines += [
            f"{law.law:8}  {law.lag:3d}  {law.step_s:6.4g}  {law.step_s / self.bound_s:8.2f}  "
            f"{law.training_wait_share:14.0%}  {law.engine_wait_share:12.0%}  {law.slots_share:5.0%}  "
            f"{law.staleness_mean:4.2f}/{law.staleness_max:<4d}  {law.redrawn_share:7.1%}"
            for law in self.laws
        ]
        return "\n".join(lines)


def forecast_lag(timing: Timing, lag: int, capacity: int | None = None) -> LagForecast:
    """Both laws with ``lag``, beside turns on the same engines.

    Args:
        capacity: groups in the buffer of the windowed law; None: those of lag + 1 steps.
    """
    size = timing.prompts_per_step
    laws: list[tuple[str, int, Law]] = [("in turns", 0, BatchLaw(size, 0))]
    if lag:
        windowed = WindowedLaw(size, lag, capacity or (lag + 1) * size)
        laws += [("batch", lag, BatchLaw(size, lag)), ("windowed", lag, windowed)]
    return LagForecast(bound(timing), tuple(Simulation(timing, law).run(name, lag) for name, lag, law in laws))


def bound(timing: Timing) -> float:
    """Seconds of a step if both halves always worked, and engines with all slots in use."""
    rng, drawn = random.Random(timing.seed), 20_000 if timing.tokens_sigma or timing.lengths else 1
    mean = sum(timing.length(rng) for _ in range(drawn)) / drawn
    sample_s = mean * (timing.token_s + timing.slots * timing.token_s_per_running) + timing.sample_s
    samples = timing.prompts_per_step * timing.samples_per_prompt
    return max(timing.training_s, samples * sample_s / (timing.replicas * timing.slots)) + timing.push_s


@dataclass
class Engine:
    """Running answers, ordered by the tokens that the engine will have decoded when they end."""

    timing: Timing
    decoded: float = 0.0  # tokens that an answer running from the beginning would have by now
    running: list[tuple[float, int, int]] = field(default_factory=list)  # a heap of (end, ticket, draw)

    @property
    def token_s(self) -> float:
        return self.timing.token_s + len(self.running) * self.timing.token_s_per_running

    def start(self, tokens: float, ticket: int, draw: int) -> None:
        tokens += self.timing.sample_s / self.timing.token_s
        heapq.heappush(self.running, (self.decoded + tokens, ticket, draw))

    def next_end(self) -> float:
        """Seconds until the first running answer ends."""
        return (self.running[0][0] - self.decoded) * self.token_s if self.running else math.inf

    def advance(self, seconds: float) -> Iterator[tuple[int, int]]:
        """Decode; yields (ticket, draw) of answers that end."""
        self.decoded += seconds / self.token_s
        while self.running and self.running[0][0] <= self.decoded + 1e-9:
            yield self.running[0][1:]
            heapq.heappop(self.running)


class Simulation:
    """One law's run in simulated time."""

    def __init__(self, timing: Timing, law: Law) -> None:
        self.timing, self.law = timing, law
        self.buffer = GroupBuffer(law)
        self.engines = [Engine(timing) for _ in range(timing.replicas)]
        self.rng = random.Random(timing.seed)
        self.now = 0.0
        self.served = self.trained = 0  # versions
        self.queue: list[Group] = []  # one entry for each answer that no slot is free for
        self.missing: dict[tuple[int, int], int] = {}  # answers of groups in flight that have not ended
        self.scoring: list[tuple[float, int, int]] = []  # a heap of (when scored, ticket, draw)
        self.training_until: float | None = None
        self.pushing_until: float | None = None
        self.idle = self.unused_slots = self.training_waits = 0.0  # seconds
        self.steps: list[float] = []  # when each ended
        self.finished: list[int] = []

    def run(self, name: str, lag: int) -> LawForecast:
        """Simulate; the first quarter is left out of the figures."""
        skipped, start = max(1, self.timing.num_steps // 4), (0.0, 0.0, 0.0, 0.0)
        staleness: list[int] = []
        redrawn = 0
        while len(self.steps) < self.timing.num_steps:
            taken = self._settle()
            if taken is not None and len(self.steps) >= skipped:
                staleness += taken.staleness
                redrawn += taken.num_redrawn
            before = len(self.steps)
            self._advance()
            if before < skipped <= len(self.steps):
                start = self.now, self.training_waits, self.idle, self.unused_slots
                self.finished.clear()
        took, waits, idle, unused = (
            end - begin
            for end, begin in zip((self.now, self.training_waits, self.idle, self.unused_slots), start, strict=True)
        )
        engines = self.timing.replicas
        return LawForecast(
            name,
            lag,
            step_s=took / (self.timing.num_steps - skipped),
            training_wait_share=waits / took,
            engine_wait_share=idle / took / engines,
            slots_share=1 - unused / took / engines / self.timing.slots,
            staleness_mean=sum(staleness) / max(1, len(staleness)),
            staleness_max=max(staleness, default=0),
            redrawn_share=redrawn / max(1, len(staleness)),
            finished_mean=sum(self.finished) / max(1, len(self.finished)),
        )

    def _settle(self) -> Any:
        """Begin everything that can begin now; returns what training took."""
        if self.pushing_until is not None:
            return None
        taken = None
        if self.training_until is None and self.trained == self.served:
            depth = self.buffer.count(Stage.FINISHED)
            taken = self.buffer.take(self.trained)
            if taken is not None:
                self.finished.append(depth)
                self.training_until = self.now + self.timing.training_s
        if self.trained > self.served and self.buffer.may_push(self.served):
            self.pushing_until = self.now + self.timing.push_s
        else:
            self._fill_slots()
        return taken

    def _fill_slots(self) -> None:
        if demand := self.buffer.demand(self.served):
            self.buffer.add([Prompt([0])] * demand.num_prompts, demand)
        while True:
            engine = min(self.engines, key=lambda engine: len(engine.running))
            if len(engine.running) >= self.timing.slots:
                return
            if not self.queue:
                group = self.buffer.start(self.served)
                if group is None:
                    return
                self.queue = [group] * self.timing.samples_per_prompt
                self.missing[group.ticket, group.draw] = self.timing.samples_per_prompt
            group = self.queue.pop()
            engine.start(self.timing.length(self.rng), group.ticket, group.draw)

    def _advance(self) -> None:
        """To the next event."""
        pushing = self.pushing_until is not None
        times = [time for time in (self.training_until, self.pushing_until) if time is not None]
        times += [self.scoring[0][0]] if self.scoring else []
        times += [] if pushing else [self.now + engine.next_end() for engine in self.engines]
        then = min(times, default=math.inf)
        assert then < math.inf, "nothing can happen any more"
        seconds, self.now = then - self.now, then
        self.training_waits += seconds if self.training_until is None else 0.0
        for engine in self.engines:
            self.idle += seconds if pushing or not engine.running else 0.0
            self.unused_slots += seconds * (self.timing.slots - (0 if pushing else len(engine.running)))
            for key in () if pushing else list(engine.advance(seconds)):
                self._ended(*key)
        while self.scoring and self.scoring[0][0] <= self.now + 1e-12:
            _, ticket, draw = heapq.heappop(self.scoring)
            self.buffer.finish(ticket, draw, [])
        if self.training_until is not None and self.training_until <= self.now:
            self.training_until, self.trained = None, self.trained + 1
        if self.pushing_until is not None and self.pushing_until <= self.now:
            self.pushing_until, self.served = None, self.trained
            self._give_up(self.buffer.expire(self.trained))
            self.steps.append(self.now)

    def _ended(self, ticket: int, draw: int) -> None:
        self.missing[ticket, draw] -= 1
        if not self.missing[ticket, draw]:
            del self.missing[ticket, draw]
            heapq.heappush(self.scoring, (self.now + self.timing.reward_s, ticket, draw))

    def _give_up(self, groups: list[Group]) -> None:
        """Free the slots of groups that are too old."""
        gone = {(group.ticket, group.draw) for group in groups}
        self.queue = [group for group in self.queue if (group.ticket, group.draw) not in gone]
        self.missing = {key: count for key, count in self.missing.items() if key not in gone}
        for engine in self.engines:
            engine.running = [item for item in engine.running if item[1:] not in gone]
            heapq.heapify(engine.running)
