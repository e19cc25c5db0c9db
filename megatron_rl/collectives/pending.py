"""`Pending`: the handle of a call whose work another thread, or several works, carry out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Pending(dist._Work):
    """Args:
    parts: done when all of them are.
    result: the tensors that are written.
    then: run once by the first `wait`, after the parts.
    """

    def __init__(
        self,
        parts: Sequence[Future[None] | dist.Work],
        result: Sequence[Tensor] = (),
        then: Callable[[], object] | None = None,
    ) -> None:
        super().__init__()
        self._parts, self._result, self._then = parts, list(result), then

    def wait(self, timeout: timedelta | None = None) -> bool:  # type: ignore[override]
        for part in self._parts:
            if isinstance(part, Future):
                part.result(timeout.total_seconds() if timeout else None)
            elif timeout:
                part.wait(timeout)
            else:
                part.wait()
        then, self._then = self._then, None
        if then is not None:
            then()
        return True

    def is_completed(self) -> bool:
        return all(part.done() if isinstance(part, Future) else part.is_completed() for part in self._parts)

    def is_success(self) -> bool:
        return self.is_completed() and all(
            part.exception() is None if isinstance(part, Future) else part.is_success() for part in self._parts
        )

    def result(self) -> list[Tensor]:
        return self._result

    def get_future(self) -> torch.futures.Future:
        done: torch.futures.Future = torch.futures.Future()
        self.wait()
        done.set_result(self._result)
        return done
