"""How far a process's resident memory grows while something runs, as Linux counts it; shared memory is in it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path


def growth(action: Callable[[], object]) -> int:
    """Bytes between the resident set before ``action`` and its peak meanwhile."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (proc_pid_clear_refs(5))
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes, of a field of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
