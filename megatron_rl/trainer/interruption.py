"""`Interruption`: SIGTERM (Slurm, Kubernetes, torchrun), SIGINT (Ctrl-C) and SIGHUP ask a run to stop.

The handler only notes the signal. The loop asks all ranks at the end of each step, so that they stop after the same
one though the signal reaches them at different moments. A step that is still sampling, computing rewards or evaluating
after half of ``grace_seconds`` is given up (`parallel.abandon`), and the other half is for saving the state before it.
A run that has not stopped after all of it is ended.
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

from megatron_rl.parallel.abandon import Abandoned, is_abandonable, watch

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STEP_SHARE = 0.5  # of the grace that the step may take; the rest is for saving
RETRY_SECONDS = 0.25
NEVER_INSIDE = ("/torch/distributed/", "/megatron/core/", "/megatron_rl/parallel/")  # other ranks are in there too
ONE_SIGNAL_SECONDS = 2.0  # Ctrl-C reaches a rank twice: from the terminal, and from torchrun, which forwards it


class Interruption:
    """The signals that asked this process to stop.

    Args:
        grace_seconds: after which the process is ended, whatever it is doing.
        on_expiry: called before that, in another thread.
        lost: describes what is lost then, for the log.
    """

    def __init__(
        self, grace_seconds: float, on_expiry: Callable[[], object], lost: Callable[[], str] = lambda: "not saved"
    ) -> None:
        self.grace_seconds, self._on_expiry, self._lost = grace_seconds, on_expiry, lost
        self.signal = 0  # the first that came; 0 = none
        self._came = 0.0
        self._nudged = False  # the next signal is our own
        self._owner = os.getpid()
        self._over = threading.Event()  # the run has stopped

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
        watch(self.overdue)
        try:
            yield
        finally:
            self._over.set()
            watch(lambda: 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def overdue(self) -> int:
        """The signal that came, once the step's share of the grace is over."""
        late = self.signal and time.monotonic() - self._came >= STEP_SHARE * self.grace_seconds
        return self.signal if late else 0

    def hear(self, number: int) -> None:
        """Take note of a signal that other ranks of the run got."""
        self._note(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a checkpoint's writer, forked from here: Ctrl-C is not meant for it
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if not self.signal:
            self.signal, self._came = number, time.monotonic()
            threading.Thread(target=self._keep_time, name="grace", daemon=True).start()
        elif self._nudged:
            self._nudged = False
            if is_abandonable() and not _is_inside(frame, NEVER_INSIDE):
                raise Abandoned(self.signal)
        elif time.monotonic() - self._came > ONE_SIGNAL_SECONDS:
            raise ended_by(number, "second signal: stopped at once")

    def _keep_time(self) -> None:
        """Runs in a thread. Code that can be abandoned is interrupted by a signal: nothing else ends sleeps and
        waits."""
        deadline = self._came + self.grace_seconds
        while not self._over.wait(RETRY_SECONDS) and time.monotonic() < deadline:
            if self.overdue() and is_abandonable():
                self._nudged = True
                signal.pthread_kill(threading.main_thread().ident or 0, self.signal)
        if not self._over.is_set():
            self._expire()

    def _expire(self) -> None:
        logger.error("not stopped %g seconds after signal %d: ended; %s", self.grace_seconds, self.signal, self._lost())
        try:
            self._on_expiry()
        finally:
            os._exit(128 + self.signal)


def _is_inside(frame: FrameType | None, places: tuple[str, ...]) -> bool:
    """Whether the code that a signal interrupted was called, however deep, from one of these folders' files."""
    while frame is not None:
        if frame.f_code.co_filename and any(place in frame.f_code.co_filename for place in places):
            return True
        frame = frame.f_back
    return False


def ended_by(number: int, what: str) -> BaseException:
    """The exception of a run that a signal has stopped: KeyboardInterrupt for Ctrl-C, else SystemExit(128 + signal)."""
    return KeyboardInterrupt(what) if number == signal.SIGINT else SystemExit(128 + number)
