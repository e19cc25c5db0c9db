"""`call`: one call of a user's function, plain or `async`, bounded in time, from an event loop.

A plain function runs in a daemonic thread of its own: one that never returns costs a thread, and neither the loop nor
the end of the process waits for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable
from typing import Any


async def call(function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
    """What ``function`` returns, or what the awaitable that it returns gives.

    Raises:
        TimeoutError: it takes longer than ``seconds``.
        Exception: whatever it raises.
    """
    async with asyncio.timeout(seconds):
        if inspect.iscoroutinefunction(function):
            return await function(*arguments)
        result = await _in_thread(function, arguments)
        return await result if inspect.isawaitable(result) else result


async def _in_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if result.done():  # given up
            return
        if error is None:
            result.set_result(value)
        else:
            result.set_exception(error)

    def run() -> None:
        value: Any = None
        error: Exception | None = None
        try:
            value = context.run(function, *arguments)
        except StopIteration as raised:  # a future cannot hold one
            error = RuntimeError(f"StopIteration: {raised}")
        except BaseException as raised:
            error = raised if isinstance(raised, Exception) else RuntimeError(f"{type(raised).__name__}: {raised}")
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name=f"environment-{getattr(function, '__name__', '')}", daemon=True).start()
    return await result
