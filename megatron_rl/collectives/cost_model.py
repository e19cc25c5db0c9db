"""What a collective costs by each path, by messages that were measured, and the choice by it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

LIBRARY = "library"
HIERARCHICAL = "hierarchical"
# Bytes at which paths are measured. Smaller messages are fooled by token buckets and socket buffers (a shaped link of
# 200 Mbit/s: 64 KB at 4 times its rate); the largest leaves the caches, where no link is slow enough to hide that.
SIZES = (1 << 20, 4 << 20, 32 << 20)
PIECES = 8  # of a message through node memory, at the least: one is sent while the next is summed
SMALLEST = 1 << 17  # bytes of such a piece; below, latency counts more than overlap

Sample = tuple[int, float]  # bytes of a message, seconds that it took


@dataclass(frozen=True, slots=True)
class Line:
    """``latency + bytes * seconds_per_byte``."""

    latency: float  # seconds
    seconds_per_byte: float

    @classmethod
    def fitted(cls, samples: Sequence[Sample]) -> Line:
        """From two sizes. A slope below zero is noise: the larger sample then gives it alone."""
        (small, quick), (large, slow) = samples
        slope = (slow - quick) / (large - small)
        if slope <= 0:
            return cls(0.0, slow / large)
        return cls(max(0.0, quick - slope * small), slope)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one path: straight lines between what was measured, and on beyond it."""

    samples: tuple[Sample, ...]  # ascending sizes, one at the least

    def seconds(self, num_bytes: int) -> float:
        """What a message of ``num_bytes`` is predicted to take."""
        (smallest, quickest), (largest, slowest) = self.samples[0], self.samples[-1]
        if num_bytes <= smallest:
            below = quickest - (smallest - num_bytes) * self._slope(self.samples)
            return max(below, quickest * num_bytes / smallest)
        if num_bytes >= largest:
            return slowest + (num_bytes - largest) * self._slope(self.samples[::-1])
        for (small, quick), (large, slow) in itertools.pairwise(self.samples):
            if num_bytes <= large:
                return quick + (slow - quick) * (num_bytes - small) / (large - small)
        raise AssertionError("samples are not in ascending order")

    def learned(self, sample: Sample) -> Cost:
        """With one more sample, in place of the one that had the same power of two of bytes."""
        others = [old for old in self.samples if old[0].bit_length() != sample[0].bit_length()]
        return Cost(tuple(sorted([*others, sample])))

    @staticmethod
    def _slope(samples: Sequence[Sample]) -> float:
        """Seconds of a byte beyond the first of ``samples``, by the next one that is twice as large or half of it."""
        end = samples[0]
        for other in samples[1:]:
            if not end[0] / 2 < other[0] < end[0] * 2:
                return Line.fitted(sorted([end, other])).seconds_per_byte
        return end[1] / end[0]


@dataclass(frozen=True, slots=True)
class Choice:
    """The path of one message."""

    path: str
    predicted: float  # seconds
    library: float  # seconds predicted for the library's path

    def __str__(self) -> str:
        return f"{self.path}: {self.predicted * 1e3:.2f} ms predicted, library {self.library * 1e3:.2f} ms"


def piece_bytes(num_bytes: float, largest: int) -> int:
    """Bytes of most pieces in which a message goes through node memory."""
    return min(largest, max(SMALLEST, math.ceil(num_bytes / PIECES)))


def piece_spans(count: int, element_bytes: int, largest: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the pieces of ``count`` elements: links wait for the first, so it is a quarter of the others.

    Args:
        largest: bytes of the largest piece.
    """
    width = max(1, piece_bytes(count * element_bytes, largest) // element_bytes)
    step, start = max(width // 4, min(width, SMALLEST // element_bytes), 1), 0
    while start < count:
        stop = min(start + step, count)
        yield start, stop
        start, step = stop, min(2 * step, width)


def choose(costs: Mapping[str, Cost], num_bytes: int, minimum_gain: float) -> Choice:
    """The fastest path; the library's unless another is predicted to save more than ``minimum_gain`` of its time."""
    seconds = {path: cost.seconds(num_bytes) for path, cost in costs.items()}
    path = fastest(seconds, minimum_gain)
    return Choice(path, seconds[path], seconds[LIBRARY])


def fastest(seconds: Mapping[str, float], minimum_gain: float) -> str:
    """The path of least time, by `choose`'s rule."""
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < (1 - minimum_gain) * seconds[LIBRARY] else LIBRARY
