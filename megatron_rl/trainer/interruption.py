"""`Interruption`: SIGTERM (Slurm, Kubernetes, torchrun), SIGINT (Ctrl-C) and SIGHUP ask a run to stop.

The handler only notes the signal. The loop asks all ranks at the end of each step, so that they stop after the same
one though the signal reaches them at different moments. A run that has not stopped after ``grace_seconds`` is ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ONE_SIGNAL_SECONDS = 2.0  # Ctrl-C reaches a rank twice: from the terminal, and from torchrun, which forwards it


class Interruption:
    """What this process was told.

    Args:
        grace_seconds: after which the process is ended wherever it is.
        on_expiry: called before that, in another thread.
    """

    def __init__(self, grace_seconds: float, on_expiry: Callable[[], object]) -> None:
        self.grace_seconds, self._on_expiry = grace_seconds, on_expiry
        self.signal = 0  # the first that came; 0 = none
        self._came = 0.0
        self._owner = os.getpid()
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While open, signals are noted; in a thread other than the main one Python cannot, and nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Not those that are ignored (nohup), nor those that a handler outside Python has (None).
        known = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in known.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._timer is not None:
                self._timer.cancel()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a checkpoint's writer, forked from here: Ctrl-C is not meant for it
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if not self.signal:
            self.signal, self._came = number, time.monotonic()
            self._timer = threading.Timer(self.grace_seconds, self._expire)
            self._timer.daemon = True
            self._timer.start()
        elif time.monotonic() - self._came > ONE_SIGNAL_SECONDS:
            raise ended_by(number, "told twice: stopped at once")

    def _expire(self) -> None:
        logger.error("not stopped %g seconds after signal %d: ended without saving", self.grace_seconds, self.signal)
        try:
            self._on_expiry()
        finally:
            os._exit(128 + self.signal)


def ended_by(number: int, what: str) -> BaseException:
    """What a run that a signal stopped raises: KeyboardInterrupt for Ctrl-C, else SystemExit with 128 + the signal."""
    return KeyboardInterrupt(what) if number == signal.SIGINT else SystemExit(128 + number)
