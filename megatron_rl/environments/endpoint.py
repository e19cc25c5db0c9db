"""`Endpoint`: the model as an OpenAI server, for agents that are written elsewhere; one session an episode.

POST {url}/sessions/KEY/v1/chat/completions, or {url}/v1/chat/completions with KEY as the API key or in the header
X-Session-ID. A session is one conversation: each request brings all messages so far, and those that are new are
appended to its tokens, which are recorded as they were generated. Sampling is that of the run; a request's own
temperature and the like are not used.
API: OpenAI, "Create chat completion".
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Mapping
from functools import cache
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.data import DataError
from megatron_rl.environments.agent_session import AgentSession, RefusedError

START_SECONDS = 30.0


class Endpoint:
    """A server on a port of its own, in a thread; `open` gives a conversation its key.

    Raises:
        ConfigError: starlette or uvicorn is not installed.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        try:
            import uvicorn  # only agents need them
            from starlette.applications import Starlette
            from starlette.routing import Route
        except ImportError as error:
            raise ConfigError(f"agents talk to an HTTP server: pip install 'megatron-rl[agents]' ({error})") from None
        routes = [
            Route(f"{prefix}/v1/{path}", handler, methods=[method])
            for prefix in ("", "/sessions/{key}")
            for path, handler, method in (("chat/completions", self._complete, "POST"), ("models", self._models, "GET"))
        ]
        self._sessions: dict[str, AgentSession] = {}
        self._socket = socket.create_server((host, 0), backlog=2048)
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off"}
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), timeout_keep_alive=600, **options))
        threading.Thread(target=self._serve, name="endpoint", daemon=True).start()

    def _serve(self) -> None:
        asyncio.run(self._server.serve([self._socket]))

    def open(self, session: AgentSession) -> tuple[str, str]:
        """(base URL, API key) of a conversation."""
        key = secrets.token_hex(16)
        self._sessions[key] = session
        return f"{self.url}/sessions/{key}/v1", key

    def add_name(self, key: str, name: str) -> None:
        """Let ``name`` stand for ``key``, where a client's requests have a number of their own."""
        self._sessions[name] = self._sessions[key]

    def forget(self, key: str) -> None:
        """End a conversation: further requests are refused, under all of its names."""
        session = self._sessions.pop(key, None)
        for name in [name for name, other in list(self._sessions.items()) if other is session]:
            self._sessions.pop(name, None)

    def close(self) -> None:
        self._server.should_exit = True

    async def _models(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse(
            {"object": "list", "data": [{"id": "policy", "object": "model", "owned_by": "megatron_rl"}]}
        )

    def _named(self, request: Any) -> tuple[AgentSession | None, str]:
        """The conversation that a request belongs to, and the key that says so."""
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        for key in (request.path_params.get("key", ""), bearer, request.headers.get("x-session-id", "")):
            if (session := self._sessions.get(key)) is not None:
                return session, key
        return None, ""

    async def _complete(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        session, key = self._named(request)
        if session is None:
            return JSONResponse(_error("this session has ended, or never was: the API key names none"), 404)
        try:
            body = json.loads(await request.body())
            choice, usage = await session.elsewhere(body)
        except RefusedError as error:
            return JSONResponse(_error(str(error), error.code), 400)
        except (ValueError, TypeError, ConfigError, DataError) as error:
            return JSONResponse(_error(f"{type(error).__name__}: {error}"), 400)
        answer = {"id": f"chatcmpl-{key[:8]}-{usage['completion_tokens']}", "created": int(time.time())}
        answer["model"] = body.get("model", "policy")
        if body.get("stream"):
            return StreamingResponse(_stream(answer, choice, usage), media_type="text/event-stream")
        return JSONResponse(answer | {"object": "chat.completion", "choices": [choice], "usage": usage})


@cache
def shared_endpoint(host: str) -> Endpoint:
    """One server for all episodes of this process: its sessions are told apart by their keys."""
    return Endpoint(host)


def _error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


async def _stream(answer: Mapping[str, Any], choice: Mapping[str, Any], usage: Mapping[str, Any]) -> AsyncIterator[str]:
    """The whole message as one chunk: a turn is known only when it is finished."""
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(delta["tool_calls"])]
    for part, reason in ((delta, None), ({}, choice["finish_reason"])):
        chunk = {"index": 0, "delta": part, "finish_reason": reason}
        yield f"data: {json.dumps(dict(answer) | {'object': 'chat.completion.chunk', 'choices': [chunk]})}\n\n"
    yield f"data: {json.dumps(dict(answer) | {'object': 'chat.completion.chunk', 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"
