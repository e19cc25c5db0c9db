"""`Delivery` wraps one tracker of a run, so that its failures never end training.

Trackers on this machine are called at once. Those over a network are called by a thread, in order, which retries during
an outage while training goes on. Records that cannot be delivered are counted and reported when the run ends.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config import masked
from megatron_rl.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

MAX_WAITING = 100_000  # records kept in memory during an outage; later ones are lost
MAX_DELAY = 30.0  # seconds between two tries

Record = tuple[str, Callable[[], object]]  # its name in messages, and the call that delivers it


class Delivery(Tracker):
    """A tracker that raises nothing.

    Args:
        name: of the tracker, in messages.
        first_delay: seconds before the second try of a record; doubled for each further one.
        patience: seconds that `close` waits for pending records.
    """

    def __init__(self, tracker: Tracker, name: str, first_delay: float = 0.5, patience: float = 60.0) -> None:
        super().__init__(tracker.run)
        self.tracker, self.name = tracker, name
        self.first_delay, self.patience = first_delay, patience
        self.num_records = 0  # handed over
        self.num_lost = 0
        self.num_failed_tries = 0
        self._last_error = ""
        self._deadline: float | None = None  # of everything, once the run has ended
        self._records: queue.Queue[Record | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def start(self, resume_step: int | None = None) -> None:
        if self.tracker.remote:
            self._thread = threading.Thread(target=self._work, name=f"tracking-{self.name}", daemon=True)
            self._thread.start()
        self._hand_over("the beginning of the run", lambda: self.tracker.start(resume_step))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        kept = dict(metrics)
        self._hand_over(f"metrics of step {step}", lambda: self.tracker.log(kept, step))

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._hand_over("the configuration", lambda: self.tracker.log_params(params))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._hand_over(f"the file {path}", lambda: self.tracker.log_artifact(path, folder))

    def close(self, status: str = "finished") -> None:
        """Waits for pending records, at most ``patience`` seconds, and reports how many were lost."""
        self._deadline = time.monotonic() + self.patience
        self._hand_over(f"the end of the run ({status})", lambda: self.tracker.close(status))
        waiting = 0
        if self._thread is not None:
            self._records.put(None)
            self._thread.join(self.patience + 5.0)
            if self._thread.is_alive():  # in a call that does not return
                waiting = self._records.qsize()
        if self.num_lost or waiting:
            logger.warning(
                "tracking: %s did not take %d of %d records of this run; last error: %s",
                self.name,
                self.num_lost + waiting,
                self.num_records,
                self._last_error or "a call that did not return",
            )
        elif self.num_failed_tries:
            logger.info("tracking: %s has every record, after %d failed tries", self.name, self.num_failed_tries)

    def _hand_over(self, what: str, call: Callable[[], object]) -> None:
        self.num_records += 1
        if self._thread is None:
            self._deliver(what, call)
            return
        try:
            self._records.put_nowait((what, call))
        except queue.Full:
            self._lose(what)

    def _work(self) -> None:
        while (record := self._records.get()) is not None:
            if self._is_over():
                self._lose(record[0])
            else:
                self._deliver(*record)

    def _deliver(self, what: str, call: Callable[[], object]) -> None:
        """Once; during an outage of a remote tracker again and again, until the run has ended."""
        delay = self.first_delay
        while True:
            try:
                call()
                return
            except Exception as error:
                self.num_failed_tries += 1
                self._last_error = masked(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
                if self._thread is None or not self.tracker.is_outage(error) or self._is_over():
                    self._lose(what)
                    return
                if delay == self.first_delay:
                    logger.warning("tracking: %s does not respond, retrying: %s", self.name, self._last_error)
            self._wait(delay)
            delay = min(2 * delay, MAX_DELAY)

    def _is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _wait(self, seconds: float) -> None:
        """Not much longer once the run has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and (self._deadline is None or seconds <= self.first_delay):
            time.sleep(min(0.1, seconds))
        if self._deadline is not None:
            time.sleep(min(self.first_delay, 0.5))

    def _lose(self, what: str) -> None:
        self.num_lost += 1
        if self.num_lost == 1:
            logger.warning("tracking: %s does not take %s: %s", self.name, what, self._last_error or "too many wait")
