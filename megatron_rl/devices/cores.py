"""Which cores of the machine this process may use."""

from __future__ import annotations

import os


def usable_cores() -> list[int]:
    """Their numbers; one, where the system does not say (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
