"""A reward server on loopback that takes only what each product's published schema allows, and can be made to fail.

Real HTTP over real sockets, in a thread. The rewards it gives are a function of the text (`true_reward`), so that a
test can tell whose answer it was given. Schemas, transcribed as pydantic records with unknown fields refused:

- vLLM 0.32 `vllm/entrypoints/pooling/{classify,pooling,scoring,base}/protocol.py`
- SGLang 0.5.23 `srt/managers/io_struct.py:EmbeddingReqInput`, answered as `http_server.py:classify_request` does
- text-embeddings-inference 1.7 `docs/openapi.json` PredictRequest / PredictInput; at most 32 inputs a request
- OpenAI "Create chat completion"
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

TEI_MAX_BATCH = 32


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class VllmClassify(Strict):
    model: str | None = None
    input: str | list[str]
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool = True


class VllmPooling(VllmClassify):
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class VllmScore(Strict):
    model: str | None = None
    text_1: str | list[str]
    text_2: str | list[str]
    use_activation: bool | None = None


class SGLangClassify(Strict):
    text: list[str] | str
    rid: list[str] | str | None = None
    sampling_params: dict[str, Any] | None = None


Single = Annotated[list[str], Field(min_length=1, max_length=1)]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class TeiPredict(Strict):
    inputs: str | Pair | list[Single | Pair]
    raw_scores: bool = False
    truncate: bool | None = None
    truncation_direction: Literal["Left", "Right"] = "Right"


class ChatMessage(Strict):
    role: Literal["system", "user", "assistant", "developer"]
    content: str


class ChatCompletion(Strict):
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    temperature: float = 1.0
    max_tokens: int | None = None
    n: int = 1
    seed: int | None = None


def true_reward(text: str) -> float:
    """What every product here thinks of a text."""
    return len(text) / 10 - 1


def classify(body: VllmClassify) -> Any:
    rows = [
        {"index": i, "label": "LABEL_0", "probs": [true_reward(text)], "num_classes": 1}
        for i, text in enumerate(body.input)
    ]
    return {"id": "classify-1", "object": "list", "created": 1, "model": body.model, "data": rows, "usage": {}}


def pooling(body: VllmPooling) -> Any:
    """As a pooler of type ALL does: one row a token, of which the last is the reward; rows in another order."""
    rows = [
        {"index": i, "object": "pooling", "data": [[99.0], [true_reward(text)]]} for i, text in enumerate(body.input)
    ]
    return {"id": "pool-1", "object": "list", "created": 1, "model": body.model, "data": rows[::-1], "usage": {}}


def score(body: VllmScore) -> Any:
    pairs = zip(body.text_1, body.text_2, strict=True)
    rows = [{"index": i, "object": "score", "score": true_reward(a + b)} for i, (a, b) in enumerate(pairs)]
    return {"id": "embd-1", "object": "list", "created": 1, "model": body.model, "data": rows, "usage": {}}


def sglang(body: SGLangClassify) -> Any:
    texts = body.text if isinstance(body.text, list) else [body.text]
    rows = [{"embedding": [true_reward(text)], "meta_info": {"id": "1", "prompt_tokens": 3}} for text in texts]
    return rows if isinstance(body.text, list) else rows[0]


def predict(body: TeiPredict) -> Any:
    """Sorted by score, as the router does."""
    if isinstance(body.inputs, str) or isinstance(body.inputs[0], str):
        raise ValueError("a single text or pair: the tests send batches")
    if len(body.inputs) > TEI_MAX_BATCH:
        raise ValueError(f"batch size {len(body.inputs)} > maximum allowed batch size {TEI_MAX_BATCH}")
    rows = []
    for (text,) in body.inputs:
        found = [{"label": "good", "score": true_reward(text)}, {"label": "bad", "score": -true_reward(text)}]
        rows.append(sorted(found, key=lambda p: -p["score"]))
    return rows


def chat(body: ChatCompletion) -> Any:
    text = body.messages[-1].content
    verdict = "I think... Score: 3? No.\n**correct:** 8\nbrief: 5/10\nScore: 7.5" if "<response>" in text else "?"
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body.model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": verdict}, "finish_reason": "stop"}],
        "usage": {},
    }


ENDPOINTS: dict[str, tuple[type[BaseModel], Callable[[Any], Any]]] = {
    "/vllm/classify": (VllmClassify, classify),
    "/vllm/pooling": (VllmPooling, pooling),
    "/vllm/score": (VllmScore, score),
    "/sglang/classify": (SGLangClassify, sglang),
    "/tei/predict": (TeiPredict, predict),
    "/v1/chat/completions": (ChatCompletion, chat),
}


class ContractServer(ThreadingHTTPServer):
    """Serves ``ENDPOINTS`` and whatever a test adds.

    Attributes:
        fault: called with the handler and the request's number (from 1); returns whether it has answered (or not).
        too_long: texts longer than this are refused with status 422, the whole request with them.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoints = dict(ENDPOINTS)
        self.plain: dict[str, Callable[[Any], Any]] = {}
        self.fault: Callable[[Handler, int], bool] = lambda handler, number: False
        self.too_long: int | None = None
        self.token: str | None = None
        self.bodies: list[Any] = []
        self.most_at_once = 0
        self._at_once = 0
        self.lock = threading.Lock()
        self.released = threading.Event()  # set at the end: hanging requests return
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def enter(self, body: Any) -> int:
        with self.lock:
            self.bodies.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            return len(self.bodies)

    def leave(self) -> None:
        with self.lock:
            self._at_once -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hung up are part of the tests."""

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: ContractServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = self.server.enter(body)
        try:
            if not self.server.fault(self, number):
                self.answer(body)
        finally:
            self.server.leave()

    def answer(self, body: Any) -> None:
        if self.server.token is not None and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.send(401, {"error": "unauthorized"})
        limit = self.server.too_long
        if limit is not None and any(len(text) > limit for text in texts_of(body)):
            return self.send(422, {"error": "too many tokens", "error_type": "validation"})
        time.sleep(0.01)
        if self.path in self.server.plain:
            return self.send(200, self.server.plain[self.path](body))
        if self.path not in self.server.endpoints:
            return self.send(404, {"detail": "Not Found"})
        schema, serve = self.server.endpoints[self.path]
        try:
            return self.send(200, serve(schema.model_validate(body)))
        except (ValidationError, ValueError) as error:
            return self.send(422, {"error": str(error)})

    def send(self, status: int, value: Any) -> None:
        self.send_bytes(status, json.dumps(value).encode())

    def send_bytes(self, status: int, content: bytes, claimed: int | None = None) -> None:
        """``claimed`` is the length that the header tells."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if claimed is None else claimed))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in texts_of(part)]
