"""`EventLoop`: an asyncio loop in a thread of its own, so that plain code can wait for what runs there.

Generation then goes on while the thread that trains waits, pushes weights, or does something else.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

CLOSE_SECONDS = 20.0

T = TypeVar("T")


class EventLoop:
    """Started on construction; `close` ends it. Daemonic: it never keeps a process alive."""

    def __init__(self, name: str = "sglang") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        return self._loop.is_closed()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin ``work`` and return at once."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """The result of ``work``; when waiting is interrupted or takes ``timeout`` seconds, it is cancelled.

        Raises:
            TimeoutError: after ``timeout``.
        """
        future = self.submit(work)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs and end the thread; may be called twice."""
        if self._loop.is_closed():
            return
        ended = asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)
        wait([ended], CLOSE_SECONDS)  # what then still runs is stopped where it stands
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results, in order. The first error ends the others, and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
