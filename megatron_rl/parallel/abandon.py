"""Giving up a step that takes too long, where that leaves no rank waiting for another.

A run that was told to stop has a deadline for the step that it is in. What may be given up then at any moment runs in

    with abandonable():
        answers = engine.generate(...)   # holds no collective

and is ended by `Abandoned` there; nothing else is. Python notices signals between its own instructions: one long call
into C (a kernel, a collective) is waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Abandoned(BaseException):
    """The step was given up: the run was told to stop, and the time for this step is over. Not an Exception: the code
    that it ends, a user's reward function for one, has no answer to it.

    The rank that gives up says so in the next `Agreement.attempt`, on leaving which all ranks give up.

    Attributes:
        signal: that told it.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"abandoned because of signal {signal}")
        self.signal = signal


class _Process:
    """Signals belong to a process, and so does this."""

    inside = False  # the main thread is in what may be given up
    due: Callable[[], int] = staticmethod(lambda: 0)  # the signal, once the time is over


def watch(due: Callable[[], int]) -> None:
    """Ask ``due`` from now on whether the time is over: the signal that told the run to stop, else 0."""
    _Process.due = staticmethod(due)


def overdue() -> int:
    """The signal that told this process to stop where the time for its step is over; else 0."""
    return _Process.due()


def is_abandonable() -> bool:
    """Whether the main thread may be ended by `Abandoned` now."""
    return _Process.inside


@contextlib.contextmanager
def abandonable(allowed: bool = True) -> Iterator[None]:
    """The body may be ended by `Abandoned`; at once where the time is over already.

    Args:
        allowed: False = not this time: the body holds a collective.
    """
    if not allowed:
        yield
        return
    if signal := overdue():
        raise Abandoned(signal)
    _Process.inside = True
    try:
        yield
    finally:
        _Process.inside = False
