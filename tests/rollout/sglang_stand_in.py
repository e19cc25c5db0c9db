"""A loopback server that keeps the contract of SGLang 0.5.23's HTTP endpoints, and breaks it on demand.

It refuses what the real one refuses (unknown fields, weights outside of a session, wrong numbers of payloads) and does
what the real one does (ignore_eos ignores stop tokens too, a pause holds requests back, answers name their weights).
Tokens come from a function, so that tests choose between a real model and something fast.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from megatron_rl.rollout import LocalEngine, SamplingParams

Fault = Literal["500", "malformed", "hang", "drop", "die", "wrong tokens", "drip", "endless"]
Generate = Callable[[list[int], dict[str, Any]], tuple[list[int], list[float], dict[str, Any]]]
GENERATE_FIELDS = {"rid", "input_ids", "sampling_params", "return_logprob", "return_routed_experts", "extra_key"}
SAMPLING_FIELDS = {"max_new_tokens", "temperature", "top_p", "top_k", "ignore_eos", "no_stop_trim", "stop"}
SAMPLING_FIELDS |= {"stop_token_ids", "sampling_seed"}


def counting(prompt: list[int], params: dict[str, Any]) -> tuple[list[int], list[float], dict[str, Any]]:
    """Tokens that tell which prompt they answer: its last token, again and again."""
    length = params["max_new_tokens"]
    return [prompt[-1]] * length, [-0.5] * length, {"type": "length", "length": length}


def of_engine(engine: LocalEngine) -> Generate:
    """A real model's tokens; one request at a time."""
    lock = threading.Lock()

    def generate(prompt: list[int], params: dict[str, Any]) -> tuple[list[int], list[float], dict[str, Any]]:
        wanted = SamplingParams(
            max_tokens=params["max_new_tokens"],
            temperature=params["temperature"],
            top_p=params["top_p"],
            top_k=max(params["top_k"], 0),
            ignore_eos=params["ignore_eos"],
            stop_token_ids=() if params["ignore_eos"] else params.get("stop_token_ids", ()),
        )
        with lock:
            ((answer,),) = engine.generate([prompt], wanted, [params["sampling_seed"]])
        matched = {"matched": answer.token_ids[-1]} if answer.finish_reason == "stop" else {"length": wanted.max_tokens}
        return answer.token_ids, answer.logprobs, {"type": answer.finish_reason, **matched}

    return generate


@dataclass
class StandIn:
    """One server; everything that it saw is open to tests."""

    generate: Generate = counting
    load: Callable[[Mapping[str, torch.Tensor]], None] = lambda weights: None
    spoil: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor  # what a write makes of a tensor
    post_load: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] = lambda weights: {}
    tp: int = 1
    port: int = 0
    sglang_version: str = "0.5.23"
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)  # further fields of /server_info
    faults: deque[Fault] = field(default_factory=deque)  # one is taken by each /generate
    die_after: int | None = None  # answers; then it dies
    weight_version: str = "default"
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    answered: list[str] = field(default_factory=list)  # request ids
    started_with: list[str] = field(default_factory=list)  # weight version of each request, when it came
    aborted: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)  # control endpoints, in order
    cache_keys: set[str | None] = field(default_factory=set)
    paused: bool = False
    in_session: bool = False
    wrote: bool = False  # in the session

    def __post_init__(self) -> None:
        stand_in = self

        class Handler(_Handler):
            server_of = stand_in

        self.changed = threading.Condition()
        self.connections: set[socket.socket] = set()
        self.gone = threading.Event()
        self._http = _bind(self.port, Handler)
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def die(self) -> None:
        """End at once, in the middle of whatever is going on."""
        if self.gone.is_set():
            return
        self.gone.set()
        with self.changed:
            self.changed.notify_all()
        threading.Thread(target=self._http.shutdown, daemon=True).start()
        self._http.socket.close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _without_end(self, fault: Fault) -> Iterator[bytes]:
        """A body that begins well and then goes on, a byte now and then or as fast as it can."""
        yield b"["
        while not self.gone.wait(0.1 if fault == "drip" else 0.0):
            yield b" " if fault == "drip" else b" " * (1 << 20)

    # --- endpoints: name -> (status, JSON or bytes) ------------------------------------------------------------------

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/generate":
            return self._generate(body)
        if path not in ("/model_info", "/server_info", "/health", "/abort_request", "/weights_checker"):
            self.calls.append(path)
        handler = getattr(self, "_" + path.strip("/"), None)
        return (404, {"detail": "Not Found"}) if handler is None else handler(body)

    def _model_info(self, body: Any) -> tuple[int, Any]:
        return 200, {"weight_version": self.weight_version, "is_generation": True}

    def _server_info(self, body: Any) -> tuple[int, Any]:
        return 200, {"version": self.sglang_version, "tp_size": self.tp, "device": self.device} | self.options

    def _health(self, body: Any) -> tuple[int, Any]:
        return (503 if "hang" in self.faults or self.paused else 200), b""

    def _pause_generation(self, body: Any) -> tuple[int, Any]:
        assert body["mode"] in ("abort", "retract", "in_place")
        self.paused = True
        return 200, {"status": "ok"}

    def _continue_generation(self, body: Any) -> tuple[int, Any]:
        with self.changed:
            self.paused = False
            self.changed.notify_all()
        return 200, {"status": "ok"}

    def _flush_cache(self, body: Any) -> tuple[int, Any]:
        return 200, b"Cache flushed.\n"

    def _begin_weight_update(self, body: Any) -> tuple[int, Any]:
        self.in_session, self.wrote = True, False
        return 200, {"success": True, "message": ""}

    def _end_weight_update(self, body: Any) -> tuple[int, Any]:
        self.in_session = False
        self.weights |= {} if self.wrote else self.post_load(self.weights)
        return 200, {"success": True, "message": ""}

    def _update_weights_from_tensor(self, body: Any) -> tuple[int, Any]:
        payloads = body["serialized_named_tensors"]
        if not self.in_session or len(payloads) != self.tp or not self.paused:
            return 400, {"success": False, "message": f"session {self.in_session}, {len(payloads)} payloads"}
        for payload in payloads:
            sent = dict(pickle.loads(base64.b64decode(payload)))
            self.weights |= {name: self.spoil(name, tensor.clone()) for name, tensor in sent.items()}
        self.load(self.weights)
        self.wrote = True
        return 200, {"success": True, "message": ""}

    def _update_weights_from_disk(self, body: Any) -> tuple[int, Any]:
        for path in sorted(Path(body["model_path"]).glob("*.safetensors")):
            self.weights |= load_file(path)
        return 200, {"success": True, "message": ""}

    def _update_weight_version(self, body: Any) -> tuple[int, Any]:
        self.weight_version = body["new_version"]
        return 200, {"success": True, "message": ""}

    def _weights_checker(self, body: Any) -> tuple[int, Any]:
        sums = {name: checksum(tensor, self.device) for name, tensor in self.weights.items()}
        ranks = [{"parallelism_info": [{"tp_rank": rank}], "checksums": sums} for rank in range(self.tp)]
        return 200, {"success": True, "ranks": ranks}

    def _release_memory_occupation(self, body: Any) -> tuple[int, Any]:
        return 200, b""

    def _resume_memory_occupation(self, body: Any) -> tuple[int, Any]:
        return 200, b""

    def _abort_request(self, body: Any) -> tuple[int, Any]:
        self.aborted.append(body["rid"])
        return 200, b""

    def _generate(self, body: Any) -> tuple[int, Any]:
        problem = _wrong(body)
        if problem:
            return 400, {"error": {"message": problem}}
        begun = self.weight_version
        self.started_with.append(begun)
        self.cache_keys.add(body.get("extra_key"))
        fault = self.faults.popleft() if self.faults else None
        if fault == "500":
            return 500, {"error": {"message": "CUDA error: an illegal memory access was encountered"}}
        if fault == "malformed":
            return 200, b'[{"output_ids": [1, 2'
        if fault == "hang":
            self.faults.appendleft("hang")  # and for good
            self.gone.wait()
        if fault == "drop":
            return 0, b""
        if fault in ("drip", "endless"):
            return 200, self._without_end(fault)
        if fault == "die":
            self.die()
        with self.changed:
            self.changed.wait_for(lambda: not self.paused or self.gone.is_set())
        pairs = zip(body["input_ids"], body["sampling_params"], strict=True)
        results = [self._result(prompt, params, begun) for prompt, params in pairs]
        if fault == "wrong tokens":
            results[0]["output_ids"] = results[0]["output_ids"][:-1]
        if self.gone.is_set():
            return 0, b""
        with self.changed:
            self.answered += body["rid"]
            if self.die_after is not None and len(self.answered) >= self.die_after:
                self.die()
        return 200, results

    def _result(self, prompt: list[int], params: dict[str, Any], begun: str) -> dict[str, Any]:
        tokens, logprobs, reason = self.generate(prompt, params)
        spans = [{"version": self.weight_version, "start": 0, "end": len(tokens)}]
        if begun != self.weight_version and len(tokens) > 1:  # an update came between: half of the tokens each
            middle = len(tokens) // 2
            spans = [{"version": begun, "start": 0, "end": middle}, spans[0] | {"start": middle}]
        meta = {"finish_reason": reason, "weight_version": self.weight_version, "weight_versions": spans}
        meta["output_token_logprobs"] = [[p, token, None] for p, token in zip(logprobs, tokens, strict=True)]
        return {"output_ids": tokens, "meta_info": meta}


def _wrong(body: Mapping[str, Any]) -> str | None:
    """What is wrong with a /generate request, by the published schema."""
    prompts, params, ids = body.get("input_ids"), body.get("sampling_params"), body.get("rid")
    if not (isinstance(prompts, list) and isinstance(params, list) and isinstance(ids, list)):
        return "input_ids, sampling_params and rid must be lists"
    if not len(prompts) == len(params) == len(ids) == len(set(ids)) or not prompts:
        return "one input_ids, sampling_params and rid for each sample"
    if set(body) - GENERATE_FIELDS or any(set(one) - SAMPLING_FIELDS for one in params):
        return f"unknown fields in {sorted(body)} or {sorted(params[0])}"
    if not all(prompt and all(type(token) is int for token in prompt) for prompt in prompts):
        return "input_ids must be integers"
    if any(not 0 <= one["sampling_seed"] < 2**63 or one["max_new_tokens"] < 1 for one in params):
        return "sampling_seed or max_new_tokens out of range"
    return None


def _bind(port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """A port that a server has just left is free only when its thread has noticed."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            return _Server(("127.0.0.1", port), handler)
        time.sleep(0.05)
    raise OSError(f"port {port} stays in use")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: StandIn

    def setup(self) -> None:
        super().setup()
        self.server_of.connections.add(self.connection)

    def finish(self) -> None:
        self.server_of.connections.discard(self.connection)
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._respond(None)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        self._respond(json.loads(content) if content else None)

    def _respond(self, body: Any) -> None:
        status, answer = self.server_of.answer(self.path, body)
        if status == 0 or self.server_of.gone.is_set():
            self.close_connection = True
            return
        if isinstance(answer, Iterator):
            self.close_connection = True
            self.send_response(status)
            self.end_headers()
            for part in answer:
                self.wfile.write(part)
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def checksum(tensor: torch.Tensor, device: str) -> str:
    """As /weights_checker's, in plain numpy: SHA-256 on a CPU, `gpu_tensor_hash` of a CUDA tensor."""
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if device != "cuda":
        return hashlib.sha256(content).hexdigest()[:16]
    words = np.frombuffer(content + b"\0" * (-len(content) % 4), np.uint32)
    total = 0
    for start in range(0, len(words), 8192):
        tile, at = words[start : start + 8192], np.arange(start, min(start + 8192, len(words)), dtype=np.uint32)
        halves = []
        for seed, factor, turns in ((0x243F6A88, 0x27D4EB2D, 15), (0x02C74EE7, 0x165667B1, 13)):
            key = tile ^ (at * np.uint32(factor) + np.uint32(seed)) ^ (at << turns | at >> (32 - turns))
            added = np.array([int(_fmix32(key).sum(dtype=np.uint64)) & 0xFFFFFFFF], np.uint32)
            halves.append(int(_fmix32(added ^ np.uint32(4 * len(words)))[0]))
        total += halves[0] << 32 | halves[1]
    x = total & (1 << 64) - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor & (1 << 64) - 1
    return f"{x ^ x >> 31:016x}"


def _fmix32(x: np.ndarray) -> np.ndarray:
    x = (x ^ x >> 16) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * np.uint32(0xC2B2AE35)
    return x ^ x >> 16
