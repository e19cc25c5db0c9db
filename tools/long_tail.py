"""A rollout engine and a training step whose times are published, so that the ideal of every schedule is known.

The engine answers with the local engine's tokens, but a prompt takes as long as a Pareto law says (`latency`), and
`SLOTS` prompts run at a time; training takes `TRAIN_S` a step. What the real work takes is part of these times.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from megatron_rl.algorithms import ALGORITHMS, GRPO
from megatron_rl.batch import Batch
from megatron_rl.rollout import ENGINES, LocalEngine
from megatron_rl.trainer import Callback, TrainingLoop

SLOTS, SHAPE, SHORTEST_S, LONGEST_S = 4, 1.3, 0.12, 1.2
TRAIN_S = 1.0
CALLS: list[float] = []  # seconds of each call of the engine in this process
ENDS: list[float] = []  # when each step was over, in this process


def latency(seed: int) -> float:
    """Seconds of the prompt with this seed: Pareto with the given shape, cut off."""
    return min(LONGEST_S, SHORTEST_S * random.Random(seed).paretovariate(SHAPE))


def makespan(seconds: Sequence[float], slots: int) -> float:
    """Of a list of jobs, each started when a slot is free."""
    free = [0.0] * slots
    for one in seconds:
        heapq.heappush(free, heapq.heappop(free) + one)
    return max(free)


@ENGINES.register("long_tail")
class LongTailEngine(LocalEngine):
    """The local engine, as slow as the law says."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.free = [0.0] * SLOTS  # when each slot is

    def generate(self, prompts: Any, params: Any, seeds: Any = None, progress: Any = None) -> Any:
        started = time.perf_counter()
        answers = super().generate(prompts, params, seeds, progress)
        due = makespan([latency(seed) for seed in seeds], SLOTS)
        CALLS.append(due)
        time.sleep(max(0.0, started + due - time.perf_counter()))
        return answers

    def submit(self, prompts: Any, params: Any, seeds: Any) -> Any:
        """Each prompt's answer comes when its time is over; it begins when a slot is free."""
        futures = []
        for seed, answer in zip(seeds, super().generate(prompts, params, seeds), strict=True):
            begins = max(time.perf_counter(), heapq.heappop(self.free))
            heapq.heappush(self.free, begins + latency(seed))
            futures.append(Future())
            timer = threading.Timer(begins + latency(seed) - time.perf_counter(), futures[-1].set_result, (answer,))
            timer.daemon = True
            timer.start()
        return futures


@ALGORITHMS.register("paced_grpo")
class PacedGRPO(GRPO):
    """GRPO that knows when its batch came."""

    came = 0.0

    def prepare(self, batch: Batch) -> None:
        type(self).came = time.perf_counter()
        super().prepare(batch)


class Clock(Callback):
    """Notes when steps are over."""

    def on_step_end(self, trainer: TrainingLoop, batch: Batch, metrics: dict[str, float]) -> None:
        ENDS.append(time.perf_counter())


class Pace(Clock):
    """A step is over `TRAIN_S` after its batch came."""

    def on_step_end(self, trainer: TrainingLoop, batch: Batch, metrics: dict[str, float]) -> None:
        time.sleep(max(0.0, PacedGRPO.came + TRAIN_S - time.perf_counter()))
        super().on_step_end(trainer, batch, metrics)


def ideal(generation: Sequence[float], train_s: float, lag: int, push_s: float = 0.0) -> list[float]:
    """When each step of the batch law ends if nothing but the two halves, and the pushes between them, takes time.

    The weights after s steps are pushed when step s - 1 is over and the batches ordered before are finished; then batch
    s + lag begins (in the beginning, all up to it). Step s begins with that push, or when batch s is there.

    Args:
        generation: seconds of each batch.
        push_s: of each push but the first; both halves stand still for it.
    """
    ends: list[float] = []
    there: dict[int, float] = {}
    idle = 0.0
    for step in range(len(generation)):
        pushed = idle = max(idle, ends[-1]) + push_s if ends else 0.0
        for batch in range(step + lag if step else 0, min(step + lag + 1, len(generation))):
            idle += generation[batch]
            there[batch] = idle
        ends.append(max(pushed, there[step]) + train_s)
    return ends
