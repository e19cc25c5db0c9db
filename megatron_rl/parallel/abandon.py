"""Interrupting a step that overruns its deadline, only where that cannot leave another rank waiting.

A run that was told to stop has a deadline for its current step. Code that may then be interrupted at any moment runs in

    with abandonable():
        answers = engine.generate(...)   # no collective inside

and is ended there by `Abandoned`; nothing else is. Python handles signals between its own instructions, so a long call
into C (a kernel, a collective) finishes first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Abandoned(BaseException):
    """The step was abandoned: the run was told to stop, and this step's deadline has passed. Not an Exception, so that
    ``except Exception`` in the interrupted code, a user's reward function for example, does not swallow it.

    The next `Agreement.attempt` passes it on, so that all ranks abandon the step.

    Attributes:
        signal: the signal that told the run to stop.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"abandoned because of signal {signal}")
        self.signal = signal


class _Process:
    """State of the whole process, as signals are delivered to the process."""

    inside = False  # the main thread is inside `abandonable`
    due: Callable[[], int] = staticmethod(lambda: 0)  # the signal, once the deadline has passed


def watch(due: Callable[[], int]) -> None:
    """Take the deadline from ``due``: it returns the signal that told the run to stop once the time is over, else 0."""
    _Process.due = staticmethod(due)


def overdue() -> int:
    """The signal that told this process to stop, once the deadline of its step has passed; else 0."""
    return _Process.due()


def is_abandonable() -> bool:
    """Whether the main thread may be ended by `Abandoned` now."""
    return _Process.inside


@contextlib.contextmanager
def abandonable(allowed: bool = True) -> Iterator[None]:
    """The body may be ended by `Abandoned`, at once if the deadline has already passed.

    Args:
        allowed: False = the body contains a collective and must not be interrupted.
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
