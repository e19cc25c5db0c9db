"""What a collective costs: ``latency + bytes * seconds_per_byte``, fitted on two sizes, and the choice by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LIBRARY = "library"
HIERARCHICAL = "hierarchical"
# Smaller messages are fooled by token buckets and socket buffers (a shaped 200 Mbit/s link: 64 KB at 4 times its rate).
SIZES = (1 << 20, 4 << 20)  # bytes
PIECES = 8  # of a message through node memory, at the least: one is sent while the next is summed
SMALLEST = 1 << 17  # bytes of such a piece; below, latency counts more than overlap


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one path."""

    latency: float  # seconds
    seconds_per_byte: float

    @classmethod
    def fitted(cls, samples: Sequence[tuple[int, float]]) -> Cost:
        """From (bytes, seconds) of two sizes. A slope below zero is noise: the larger sample then gives it alone."""
        (small, quick), (large, slow) = samples
        slope = (slow - quick) / (large - small)
        if slope <= 0:
            return cls(0.0, slow / large)
        return cls(max(0.0, quick - slope * small), slope)

    def seconds(self, num_bytes: int) -> float:
        return self.latency + num_bytes * self.seconds_per_byte


@dataclass(frozen=True, slots=True)
class Choice:
    """The path of one message."""

    path: str
    predicted: float  # seconds
    library: float  # seconds predicted for the library's path

    def __str__(self) -> str:
        return f"{self.path}: {self.predicted * 1e3:.2f} ms predicted, library {self.library * 1e3:.2f} ms"


def piece_bytes(num_bytes: float, largest: int) -> int:
    """Bytes of the pieces in which a message goes through node memory."""
    return min(largest, max(SMALLEST, math.ceil(num_bytes / PIECES)))


def choose(costs: Mapping[str, Cost], num_bytes: int, minimum_gain: float) -> Choice:
    """The fastest path; the library's unless another is predicted to save more than ``minimum_gain`` of its time."""
    seconds = {path: cost.seconds(num_bytes) for path, cost in costs.items()}
    path = fastest(seconds, minimum_gain)
    return Choice(path, seconds[path], seconds[LIBRARY])


def fastest(seconds: Mapping[str, float], minimum_gain: float) -> str:
    """The path of least time, by `choose`'s rule."""
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < (1 - minimum_gain) * seconds[LIBRARY] else LIBRARY
