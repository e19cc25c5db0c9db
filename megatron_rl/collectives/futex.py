"""Sleeping until a word of shared memory changes: Linux's futex(2), between processes.

Who waits takes no processor, and is woken at once by whoever changed the word. Where there is no futex (other systems
and processors), who waits polls.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import time

NUMBERS = {"x86_64": 202, "aarch64": 98}  # of the system call
WAIT, WAKE = 0, 1
EVERYONE = 2**31 - 1
NAP = 1e-3  # seconds between polls


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def _system_call() -> tuple[ctypes._FuncPointer, int] | None:
    number = NUMBERS.get(platform.machine()) if sys.platform == "linux" else None
    return (ctypes.CDLL(None).syscall, number) if number is not None else None


_FUTEX = _system_call()


def wait(address: int, seen: int, seconds: float) -> None:
    """Return when the word at ``address`` is no longer ``seen``, or after that long; sooner now and then.

    Args:
        address: of an aligned 64-bit word, of which the lower half is compared.
    """
    if _FUTEX is None:
        time.sleep(min(NAP, seconds))
        return
    call, number = _FUTEX
    limit = _Timespec(int(seconds), int(seconds % 1 * 1e9))
    call(
        ctypes.c_long(number), ctypes.c_void_p(address), ctypes.c_int(WAIT), ctypes.c_uint(seen & 0xFFFFFFFF),
        ctypes.byref(limit), None, ctypes.c_int(0),
    )  # fmt: skip


def wake(address: int) -> None:
    """Wake all who wait for the word at ``address``; after it was changed."""
    if _FUTEX is not None:
        call, number = _FUTEX
        call(
            ctypes.c_long(number), ctypes.c_void_p(address), ctypes.c_int(WAKE), ctypes.c_int(EVERYONE), None, None,
            ctypes.c_int(0),
        )  # fmt: skip
