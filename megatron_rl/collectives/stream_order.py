"""`StreamOrder`: work of another thread in the order of the caller's CUDA stream; on CPUs, plain calls."""

from __future__ import annotations

from collections.abc import Callable

import torch


class StreamOrder:
    """A stream for the thread that works, and events between it and the streams of those who call."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        """On the caller's thread: what its stream has queued so far."""
        return torch.cuda.current_stream().record_event() if self._stream is not None else None

    def inside(self, mark: torch.cuda.Event | None, work: Callable[[], object]) -> Callable[[], None]:
        """``work`` for the other thread: on its stream, after the mark, and finished on the device when it returns."""

        def run() -> None:
            with torch.no_grad():
                if self._stream is None or mark is None:
                    work()
                    return
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(mark)
                    work()
                    self._stream.synchronize()

        return run

    def finish(self) -> None:
        """Wait for the stream: before a clock is read."""
        if self._stream is not None:
            self._stream.synchronize()
