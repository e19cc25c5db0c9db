"""`SGLangClient`: one server's HTTP endpoints as methods, bounded in time and size, with errors that say what failed.

It sends a request once: who retries, and where, is the engine's business. Endpoints and fields are those of SGLang
0.5.23 (`sglang/srt/entrypoints/http_server.py`, `sglang/srt/managers/io_struct.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, Literal

import httpx

from megatron_rl.config import ConfigError

Json = dict[str, Any]
PauseMode = Literal["abort", "retract", "in_place"]

# Since 0.5.21 tensor and distributed updates stand between /begin_weight_update and /end_weight_update, which earlier
# servers do not have; what a later minor version changes is not known.
OLDEST_VERSION, NEWEST_VERSION = (0, 5, 21), (0, 6, 0)
SUPPORTED_VERSIONS = "0.5.21 or later, before 0.6"
CONTROL_SECONDS = 60.0
ABORT_SECONDS = 5.0
# An idle connection is reused for so long: uvicorn closes it after 5 s (SGLANG_TIMEOUT_KEEP_ALIVE), and a request that
# reaches a busy server just then is lost.
IDLE_SECONDS = 2.0
MAX_BYTES = 64 << 20  # of an answer; the checksums of a large model's parameters are the longest
EVENT, LAST_EVENT = b"data: ", b"data: [DONE]"  # of a stream
BODY_EXCERPT = 300  # characters of an answer that an error quotes


class ServerError(RuntimeError):
    """A server could not be reached, or its answer was not valid. Another server, or another attempt, may succeed."""


class RequestError(ValueError):
    """The server refused the request itself (4xx): trying again changes nothing."""


class _TooLongError(RuntimeError):
    """The answer is longer than its limit."""


class SGLangClient:
    """Talks to the server at ``url``; to be used from one event loop.

    Args:
        url: for example http://127.0.0.1:30000.
        timeout: seconds that a generation may take, from request to answer.
        connections: most requests at a time; further ones wait.
        api_key: bearer token, where the server wants one.
    """

    def __init__(self, url: str, timeout: float = 3600.0, connections: int = 256, api_key: str | None = None) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout, connect=10.0, pool=None),
            # Two more than generations can take, so that control requests never wait behind them.
            limits=httpx.Limits(max_connections=connections + 2, keepalive_expiry=IDLE_SECONDS),
            trust_env=False,
        )

    def __repr__(self) -> str:
        return f"SGLangClient({self.url})"

    async def send(
        self,
        method: Literal["GET", "POST"],
        path: str,
        body: Json | None = None,
        timeout: float = CONTROL_SECONDS,
        max_bytes: int = MAX_BYTES,
    ) -> bytes:
        """The body of the answer to one request.

        Args:
            timeout: seconds from the request to the last byte of the answer.

        Raises:
            ServerError: no connection, no whole answer in time or in ``max_bytes``, or a 5xx status.
            RequestError: a status that is no success otherwise; redirects are not followed.
        """
        async with self._answer(method, path, body, timeout) as answer:
            content = await _read_bounded(answer, max_bytes)
        self._check(path, answer.status_code, content)
        return content

    @contextlib.asynccontextmanager
    async def _answer(self, method: str, path: str, body: Json | None, timeout: float) -> AsyncIterator[httpx.Response]:
        """An answer whose body is not read yet. Whatever fails, a timeout included, is a ServerError."""
        each_read = httpx.Timeout(timeout, connect=10.0, pool=None)
        try:
            async with asyncio.timeout(timeout):  # of the whole answer: a server may send a byte now and then for ever
                async with self._http.stream(method, path, json=body, timeout=each_read) as answer:
                    yield answer
        except TimeoutError:
            raise ServerError(f"{self.url}{path} did not finish its answer within {timeout:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, _TooLongError) as error:
            raise ServerError(f"{self.url}{path}: {type(error).__name__} {error}".rstrip()) from error

    def _check(self, path: str, status: int, content: bytes) -> None:
        text = content[:BODY_EXCERPT].decode(errors="replace")
        if status >= 500 or status == httpx.codes.TOO_MANY_REQUESTS:
            raise ServerError(f"{self.url}{path} answered {status}: {text}")
        if 300 <= status < 400:  # it would carry prompts and the key elsewhere
            raise RequestError(f"{self.url}{path} answered {status}, a redirect: give the server's own address")
        if not 200 <= status < 300:
            raise RequestError(f"{self.url}{path} answered {status}: {text}")

    async def post(self, path: str, body: Json, timeout: float = CONTROL_SECONDS) -> Any:
        """The JSON of the answer; ServerError where it is none."""
        return self._parse(path, await self.send("POST", path, body, timeout))

    async def get(self, path: str, timeout: float = CONTROL_SECONDS) -> Any:
        """The JSON of the answer; ServerError where it is none."""
        return self._parse(path, await self.send("GET", path, None, timeout))

    def _parse(self, path: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            excerpt = content[:BODY_EXCERPT].decode(errors="replace")
            raise ServerError(f"{self.url}{path} did not answer with JSON: {excerpt!r}") from None

    # What the server is

    async def server_info(self) -> Json:
        """What it was started with; ``version`` is SGLang's. See `check_version`."""
        return _record(await self.get("/server_info"), self.url)

    async def check_health(self, timeout: float) -> None:
        """Have it generate a token, unless it is generating already."""
        await self.send("GET", "/health", timeout=timeout)

    async def weight_version(self) -> str:
        """Name of the weights that the server holds; "default" until somebody names them."""
        return str(_record(await self.get("/model_info", timeout=10.0), self.url).get("weight_version"))

    # Generation

    async def generate(self, body: Json, max_bytes: int = MAX_BYTES) -> Any:
        """/generate, as it is: the caller writes the body and reads the answer."""
        return self._parse("/generate", await self.send("POST", "/generate", body, self.timeout, max_bytes))

    async def stream(self, body: Json, max_bytes: int = MAX_BYTES) -> AsyncGenerator[Json, None]:
        """/generate with ``stream``: each event, of at most ``max_bytes``, as it comes.

        Raises:
            ServerError, RequestError: as `send`; also in the middle, when the connection breaks.
        """
        path = "/generate"
        async with self._answer("POST", path, body, self.timeout) as answer:
            if not answer.is_success:
                self._check(path, answer.status_code, await _read_bounded(answer, max_bytes))
            async for line in _bounded_lines(answer, max_bytes):
                if line.startswith(EVENT) and line != LAST_EVENT:
                    yield _record(self._parse(path, line.removeprefix(EVENT)), self.url)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests; unknown ids are ignored."""
        bodies = [{"rid": request_id, "abort_all": False} for request_id in request_ids]
        await asyncio.gather(*(self.send("POST", "/abort_request", body, ABORT_SECONDS) for body in bodies))

    async def pause(self, mode: PauseMode) -> None:
        """Stop generating. retract: running requests wait anew, their cache can be flushed; in_place: they keep their
        cache; abort: they end."""
        await self.send("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Generate again after `pause`."""
        await self.send("POST", "/continue_generation", {})

    async def flush_cache(self) -> None:
        """Forget cached prefixes; refused while requests run."""
        await self.send("POST", "/flush_cache")

    # Weights

    async def begin_weight_update(self) -> None:
        await self._succeed("/begin_weight_update", {})

    async def end_weight_update(self) -> None:
        await self._succeed("/end_weight_update", {})

    async def update_weights_from_tensor(
        self,
        payloads: Sequence[str],
        *,
        load_format: str | None = None,
        version: str | None = None,
        flush_cache: bool = False,
        timeout: float = 600.0,
    ) -> None:
        """Write tensors; ``payloads[i]`` is the base64 text of what tensor-parallel rank i of the server takes."""
        body: Json = {"serialized_named_tensors": list(payloads), "flush_cache": flush_cache}
        body |= {} if load_format is None else {"load_format": load_format}
        await self._succeed("/update_weights_from_tensor", body | _version(version), timeout)

    async def update_weights_from_disk(
        self, folder: str, *, version: str | None = None, flush_cache: bool = True, timeout: float = 1800.0
    ) -> None:
        """Load the Hugging Face ``folder``, which the server reads itself."""
        # Without a format it would load as it started, which may have been with dummy weights.
        body: Json = {"model_path": folder, "flush_cache": flush_cache, "load_format": "auto"}
        await self._succeed("/update_weights_from_disk", body | _version(version), timeout)

    async def init_weights_update_group(self, body: Mapping[str, Any], timeout: float = 300.0) -> None:
        await self._succeed("/init_weights_update_group", dict(body), timeout)

    async def destroy_weights_update_group(self, body: Mapping[str, Any]) -> None:
        await self._succeed("/destroy_weights_update_group", dict(body))

    async def update_weights_from_distributed(self, body: Mapping[str, Any], timeout: float = 600.0) -> None:
        await self._succeed("/update_weights_from_distributed", dict(body), timeout)

    async def set_weight_version(self, version: str) -> None:
        """Name the weights that the server holds now; running requests go on."""
        await self._succeed("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    async def check_weights(self, action: str = "checksum") -> Json:
        """/weights_checker: with "checksum", ``ranks`` holds each rank's hash of each of its parameters."""
        return await self._succeed("/weights_checker", {"action": action}, 600.0)

    async def release_memory(self, tags: Sequence[str]) -> None:
        await self.send("POST", "/release_memory_occupation", {"tags": list(tags)}, timeout=300.0)

    async def resume_memory(self, tags: Sequence[str]) -> None:
        await self.send("POST", "/resume_memory_occupation", {"tags": list(tags)}, timeout=300.0)

    async def close(self) -> None:
        """Drop all connections."""
        await self._http.aclose()

    async def _succeed(self, path: str, body: Json, timeout: float = CONTROL_SECONDS) -> Json:
        """An endpoint that answers {"success", "message"}, of which some say 200 to a failure."""
        answer = _record(await self.post(path, body, timeout), self.url)
        if not answer.get("success"):
            raise ServerError(f"{self.url}{path} did not succeed: {str(answer)[:BODY_EXCERPT]}")
        return answer


def version_numbers(version: str) -> tuple[int, ...]:
    """Major, minor and patch number of an SGLang version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def check_version(version: str, url: str) -> None:
    """Raises ConfigError for a server that this client was not written for."""
    if not OLDEST_VERSION <= version_numbers(version) < NEWEST_VERSION:
        raise ConfigError(
            f"the server at {url} runs SGLang {version}, but supported is {SUPPORTED_VERSIONS} (0.5.23 is tested), "
            f"because the endpoints of weight updates differ: install such a version"
        )


def _record(answer: Any, url: str) -> Json:
    if not isinstance(answer, dict):
        raise ServerError(f"{url} answered {str(answer)[:BODY_EXCERPT]!r}, expected a JSON object")
    return answer


def _version(version: str | None) -> Json:
    return {} if version is None else {"weight_version": version}


async def _read_bounded(response: httpx.Response, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        _TooLongError: it is longer than ``max_bytes``; the rest is not read.
    """
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        _check_length(content, max_bytes)
    return bytes(content)


async def _bounded_lines(response: httpx.Response, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Each line as it comes, without its end.

    Raises:
        _TooLongError: a line is longer than ``max_bytes``.
    """
    rest = bytearray()
    async for chunk in response.aiter_bytes():
        rest += chunk
        if b"\n" in chunk:
            *lines, last = rest.split(b"\n")
            rest = bytearray(last)
            for line in lines:
                _check_length(line, max_bytes)
                yield bytes(line.removesuffix(b"\r"))
        _check_length(rest, max_bytes)
    if rest:
        yield bytes(rest)


def _check_length(content: bytes | bytearray, max_bytes: int) -> None:
    if len(content) > max_bytes:
        raise _TooLongError(f"it answered with more than {max_bytes:,} bytes")
