"""Reading an answer up to a limit, so that a server that never ends its answer exhausts neither memory nor time."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import httpx


class TooLongError(RuntimeError):
    """The answer is longer than its limit."""


async def read_bounded(response: httpx.Response, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        TooLongError: it is longer than ``max_bytes``; the rest is not read.
    """
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        _check(content, max_bytes)
    return bytes(content)


async def bounded_lines(response: httpx.Response, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Each line as it comes, without its end.

    Raises:
        TooLongError: a line is longer than ``max_bytes``.
    """
    rest = bytearray()
    async for chunk in response.aiter_bytes():
        rest += chunk
        if b"\n" in chunk:
            *lines, last = rest.split(b"\n")
            rest = bytearray(last)
            for line in lines:
                _check(line, max_bytes)
                yield bytes(line.removesuffix(b"\r"))
        _check(rest, max_bytes)
    if rest:
        yield bytes(rest)


def _check(content: bytes | bytearray, max_bytes: int) -> None:
    if len(content) > max_bytes:
        raise TooLongError(f"it answered with more than {max_bytes:,} bytes")
