"""The client of SGLang servers against sockets that answer badly: no answer lasts, or grows, without a limit."""

from __future__ import annotations

import asyncio
import gzip
import socketserver
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from megatron_rl.rollout.sglang.generation import GenerateRequest, SamplingParams
from megatron_rl.rollout.sglang.sglang_client import IDLE_SECONDS, RequestError, ServerError, SGLangClient
from megatron_rl.rollout.sglang.verification import server_checksums

pytestmark = pytest.mark.timeout(60)
OK = b"HTTP/1.1 200 OK\r\n"
SECONDS = 0.6  # that a request may take
LONGEST = 10.0  # that it takes on a busy machine


class RawServer(socketserver.ThreadingTCPServer):
    """Answers every connection with whatever bytes ``answer`` yields."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, answer: Callable[[RawServer], Iterator[bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.answer, self.requests = answer, list[bytes]()
        self.ended = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what is tested."""

    def close(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()


class Connection(socketserver.BaseRequestHandler):
    server: RawServer

    def handle(self) -> None:
        self.server.requests.append(self.request.recv(1 << 16))
        for part in self.server.answer(self.server):
            self.request.sendall(part)


def slowly(begin: bytes, part: bytes) -> Callable[[RawServer], Iterator[bytes]]:
    def answer(server: RawServer) -> Iterator[bytes]:
        yield begin
        while not server.ended.wait(0.05):
            yield part

    return answer


def fast(begin: bytes, part: bytes) -> Callable[[RawServer], Iterator[bytes]]:
    def answer(server: RawServer) -> Iterator[bytes]:
        yield begin
        while not server.ended.is_set():
            yield part

    return answer


def once(content: bytes) -> Callable[[RawServer], Iterator[bytes]]:
    return lambda server: iter([content])


@pytest.fixture
def serve() -> Iterator[Callable[..., RawServer]]:
    servers = []

    def start(answer: Callable[[RawServer], Iterator[bytes]]) -> RawServer:
        servers.append(RawServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


async def streamed(client: SGLangClient) -> list[Any]:
    return [event async for event in client.stream({}, max_bytes=10_000)]


def one_answer(server: RawServer) -> Iterator[bytes]:
    """Each connection is good for one answer, though it stays open: a server about to close it."""
    yield OK + b"Content-Length: 2\r\n\r\n{}"
    server.ended.wait(LONGEST)


def test_a_connection_that_was_idle_for_long_is_not_used_again(serve: Callable[..., RawServer]) -> None:
    server = serve(one_answer)

    async def twice() -> None:
        client = SGLangClient(server.url)
        await client.send("GET", "/", timeout=SECONDS)
        await asyncio.sleep(IDLE_SECONDS + 0.1)
        await client.send("GET", "/", timeout=LONGEST)
        await client.close()

    asyncio.run(twice())
    assert len(server.requests) == 2


REQUESTS: dict[str, Callable[[SGLangClient], Awaitable[Any]]] = {
    "generate": lambda client: client.generate({}, max_bytes=10_000),
    "stream": streamed,
    "control": lambda client: client.send("GET", "/model_info", timeout=SECONDS, max_bytes=10_000),
}


def ask(server: RawServer, request: str) -> Any:
    async def run() -> Any:
        client = SGLangClient(server.url, timeout=SECONDS)
        try:
            return await REQUESTS[request](client)
        finally:
            await client.close()

    began = time.monotonic()
    try:
        return asyncio.run(run())
    finally:
        assert time.monotonic() - began < LONGEST


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize(
    ("begin", "part"),
    [
        (OK + b"\r\n[", b" "),
        (OK + b"\r\n", b": still here\n\n"),
        (OK + b"X-Slow: ", b"a"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 500 Oops\r\n\r\n", b"a"),
    ],
    ids=["body", "events", "header", "chunks", "error"],
)
def test_an_answer_that_drips_is_given_up_in_time(serve, begin: bytes, part: bytes, request_: str) -> None:
    with pytest.raises(ServerError, match=r"did not finish its answer within 0\.6 s"):
        ask(serve(slowly(begin, part)), request_)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found", b"503 Busy"])
def test_an_answer_without_an_end_is_not_kept(serve, status: bytes, request_: str) -> None:
    with pytest.raises(ServerError, match="more than 10,000 bytes"):
        ask(serve(fast(b"HTTP/1.1 " + status + b"\r\n\r\n", b" " * 5000)), request_)


def test_a_packed_answer_is_measured_unpacked(serve) -> None:
    packed = gzip.compress(b" " * 5_000_000)
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    with pytest.raises(ServerError, match="more than 10,000 bytes"):
        ask(serve(once(head + packed)), "generate")


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_no_success_and_is_not_followed(serve, status: int, request_: str) -> None:
    elsewhere = serve(once(OK + b"Content-Length: 2\r\n\r\n{}"))
    head = f"HTTP/1.1 {status} Elsewhere\r\nLocation: {elsewhere.url}/x\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(RequestError, match=f"answered {status}, a redirect: give the server's own address"):
        ask(serve(once(head.encode())), request_)
    assert elsewhere.requests == []


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b"nonsense"],
    ids=["deep", "5,000 digits", "no text", "no JSON"],
)
def test_what_is_no_json_is_a_server_error(serve, content: bytes) -> None:
    head = OK + b"Content-Length: %d\r\n\r\n" % (len(content) + 8)

    async def run(server: RawServer) -> Any:
        return await SGLangClient(server.url).generate({})

    with pytest.raises(ServerError, match="did not answer with JSON"):
        asyncio.run(run(serve(once(head + b"        " + content))))


def test_a_body_that_is_not_the_gzip_it_claims_is_a_server_error(serve) -> None:
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n"
    with pytest.raises(ServerError, match="DecodingError"):
        ask(serve(once(head + b"oops")), "generate")


@pytest.mark.parametrize("ranks", ["[]{", "7", "[7]", '[{"parallelism_info": [], "checksums": {}}]'])
def test_checksums_of_another_form_are_a_server_error(serve, ranks: str) -> None:
    body = f'{{"success": true, "ranks": {ranks}}}'.encode()

    async def run(server: RawServer) -> Any:
        return await server_checksums(SGLangClient(server.url))

    with pytest.raises(ServerError):
        asyncio.run(run(serve(once(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body))))


def test_events_are_read_line_by_line_however_they_are_cut(serve) -> None:
    def answer(server: RawServer) -> Iterator[bytes]:
        yield OK + b"\r\n"
        for part in (b'data: {"a', b'": 1}\r\n\r', b'\ndata: {"a": 2}\n\n', b"data: [DONE]\n\n"):
            yield part
            time.sleep(0.02)

    assert ask(serve(answer), "stream") == [{"a": 1}, {"a": 2}]


def test_the_limit_of_an_answer_grows_with_what_was_asked_for() -> None:
    def limit(samples: int, tokens: int, routed: tuple[int, int] | None = None) -> int:
        return GenerateRequest(0, [1, 2], [0] * samples, SamplingParams(max_tokens=tokens), (), routed).max_bytes

    assert limit(8, 1000) > 8 * 1000 * 100
    assert limit(8, 1000) < limit(16, 1000) < limit(16, 2000) < limit(16, 2000, (94, 8))
    assert limit(1, 1000, (94, 8)) > 1000 * 94 * 8 * 4 * 4 // 3
