"""`WorkTime`: when a rank did what; stages leave them in ``batch.work``, and a run's trace is made of them."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkTime:
    """One stretch of time on one rank."""

    name: str  # "actor.sample", "push", "wait for other ranks"
    started: float  # time.perf_counter()
    seconds: float
    row: str = "stages"  # a rank's row in the picture: stages, engine, waiting

    @classmethod
    def since(cls, started: float, name: str, row: str = "stages") -> WorkTime:
        """From ``started`` (``time.perf_counter()``) until now."""
        return cls(name, started, time.perf_counter() - started, row)
