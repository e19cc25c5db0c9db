"""`ServiceClient`: one JSON request, answered by one JSON value within bounds of time and size, or by a clear error.

Transient failures (refused or broken connections, timeouts, overload, truncated answers) are retried here with
exponential waits and jitter. Permanent ones are told apart: a request that the server rejects, and a server that is
not the service that was configured.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import ssl
import time
from collections import Counter
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_rl.config.credentials import MASK, masked
from megatron_rl.rewards.service.proxies import reached_directly
from megatron_rl.rewards.service.service_config import ServiceConfig, bearer_headers

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRANSIENT = frozenset({408, 425, 429})  # and 5xx: worth another attempt
REJECTED = frozenset({400, 413, 422})  # this request is at fault, others may not be
LONGEST_WAIT = 20.0
LONGEST_RETRY_AFTER = 60.0  # seconds; a server that asks for more is asked again after these
IDLE_SECONDS = 2.0  # that a connection is reused for: uvicorn, under vLLM and SGLang, closes it after 5 s
BODY_HEAD = 300  # characters of an error's body in messages


class NoAnswerError(RuntimeError):
    """No usable answer; the message says why."""


class TransientError(NoAnswerError):
    """A transient failure: worth another attempt, at least ``retry_after`` seconds from now."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RejectedError(NoAnswerError):
    """The server refuses this very request."""


class WrongServerError(RuntimeError):
    """The server is not the configured service, or refuses our credentials."""


class ServiceClient:
    """Posts JSON to one service. Used inside one event loop: ``async with ServiceClient(...) as client``.

    Args:
        counts: ``requests`` and ``retries`` are added up here.
    """

    def __init__(self, config: ServiceConfig, name: str, counts: Counter[str]) -> None:
        self.config = config
        self.name = name
        self.counts = counts
        trust: ssl.SSLContext | bool = True
        if config.ca_file is not None:
            trust = ssl.create_default_context(cafile=config.ca_file)
        self._http = httpx.AsyncClient(
            headers={"Content-Type": "application/json", **bearer_headers(config, name)},
            verify=trust,
            timeout=httpx.Timeout(config.timeout),
            limits=httpx.Limits(max_connections=config.concurrency, keepalive_expiry=IDLE_SECONDS),
            trust_env=not reached_directly(config.url, os.environ),
            follow_redirects=False,  # a redirect would carry the token elsewhere
        )
        self._slots = asyncio.Semaphore(config.concurrency)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def ask(self, path: str, body: Any, read: Callable[[Any], T]) -> T:
        """Post ``body`` to ``path`` and return what ``read`` makes of the JSON answer.

        Raises:
            NoAnswerError: every attempt failed, or the answer is too long.
            RejectedError: status 400, 413 or 422.
            WrongServerError: any other status that another attempt would not change.
        """
        attempts = AsyncRetrying(
            stop=stop_after_attempt(self.config.retries + 1),
            wait=_wait(self.config.retry_wait),
            retry=retry_if_exception_type(TransientError),
            reraise=True,
        )
        async for attempt in attempts:
            with attempt:
                async with self._slots:
                    self.counts["requests"] += 1
                    self.counts["retries"] += attempt.retry_state.attempt_number > 1
                    return read(await self._once(path, body))
        raise AssertionError("tenacity returns or raises")

    async def _once(self, path: str, body: Any) -> Any:
        url = self.config.url + path
        shown = masked(url)  # for messages, which reach logs
        try:
            sent = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:  # a lone surrogate, NaN, an object
            raise RejectedError(f"the request to {shown} cannot be written as JSON: {error!s:.100}") from None
        try:
            async with asyncio.timeout(self.config.timeout):  # httpx bounds each read, not their sum
                async with self._http.stream("POST", url, content=sent) as response:
                    content = await self._content(shown, response)
        except TimeoutError:
            raise TransientError(f"{shown} did not answer within {self.config.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise TransientError(f"{shown}: {type(error).__name__}: {error}") from None
        content = self._without_token(content)
        _check_status(shown, response.status_code, content, response.headers.get("retry-after"))
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise TransientError(f"{shown} did not answer with JSON: {_head(content)}") from None

    def _without_token(self, content: bytes) -> bytes:
        """``content`` without the token, which a server may echo and messages would then show."""
        token = self._http.headers.get("Authorization", "").removeprefix("Bearer ")
        return content.replace(token.encode(), MASK.encode()) if token else content

    async def _content(self, url: str, response: httpx.Response) -> bytes:
        limit = self.config.max_response_bytes
        received = bytearray()
        async for chunk in response.aiter_bytes():
            received += chunk
            if len(received) > limit:
                raise NoAnswerError(f"{url} answered with more than {limit} bytes (max_response_bytes)")
        return bytes(received)


def _wait(first: float) -> Callable[[RetryCallState], float]:
    """Seconds before the next attempt: exponential with jitter, and no less than the server asks for, up to a cap."""
    usual = wait_random_exponential(multiplier=2 * first, max=LONGEST_WAIT)

    def seconds(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(usual(state), error.retry_after if isinstance(error, TransientError) else 0.0)

    return seconds


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3), at most `LONGEST_RETRY_AFTER`; 0 = nothing."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if math.isfinite(seconds) else 0.0


def _check_status(url: str, status: int, content: bytes, retry_after: str | None = None) -> None:
    if 200 <= status < 300:
        return
    message = f"{url} answered with status {status}: {_head(content)}"
    if status in TRANSIENT or status >= 500:
        raise TransientError(message, _retry_after(retry_after))
    if status in REJECTED:
        raise RejectedError(message)
    hint = {401: "; set token_env", 403: "; is the token in token_env right?", 404: "; is the kind of service right?"}
    raise WrongServerError(message + hint.get(status, ""))


def _head(content: bytes) -> str:
    return repr(content[:BODY_HEAD].decode(errors="replace"))
