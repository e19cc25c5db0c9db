"""Two real servers of one engine that the tests of this folder share, and what they ask of servers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import torch
from integration.environment import sglang_python
from rollout.engine_contract import Loaded
from rollout.rollout_models import CONFIGS, Cutter, architecture_of, random_model
from transformers import LlamaConfig

from megatron_rl.models import rollout_layout
from megatron_rl.rollout import SGLangEngine
from megatron_rl.rollout.sglang.membership import Member
from megatron_rl.rollout.sglang.server import SGLangServer

CONFIGS["llama_long"] = LlamaConfig(**CONFIGS["llama"].to_dict() | {"max_position_embeddings": 512})
MODEL = random_model("llama_long")
ARCHITECTURE = architecture_of(MODEL.config)
LAYOUT = rollout_layout(ARCHITECTURE, 1, [[0]])
MAX_RUNNING = 32


def start_pair() -> Iterator[Loaded]:
    """An engine that owns two servers; it holds no weights yet, ``shards`` are those of `MODEL`."""
    server = {"python": sglang_python(), "context_length": 512, "max_total_tokens": 32768}
    server["args"] = {"incremental-streaming-output": True, "stream-interval": 8}
    shards = Cutter(ARCHITECTURE, MODEL.state_dict()).cut()
    with SGLangEngine(
        ARCHITECTURE, LAYOUT, dtype=torch.float32, eos_token_ids=[2], max_running=MAX_RUNNING, server=server, servers=2
    ) as engine:
        yield Loaded(engine, MODEL, shards, vocab=100, eos=2, exact_seeds=False)


def attached(loaded: Loaded, **options: object) -> SGLangEngine:
    """A further engine over the same servers, which may be closed without ending them."""
    return SGLangEngine(
        ARCHITECTURE,
        LAYOUT,
        dtype=torch.float32,
        urls=loaded.engine.urls,  # type: ignore[attr-defined]
        max_running=MAX_RUNNING,
        **options,
    )


def members_of(engine: SGLangEngine) -> list[Member]:
    return engine._membership.members


def processes_of(server: SGLangServer | None) -> list[int]:
    """The server's own processes, its guard excepted, as /proc knows them: children of the guard, and theirs; also
    those of a fork that a child of the guard stands for (`server_stub.py`)."""
    assert server is not None
    assert server._guard is not None
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    stubs = Path(server.python).parent / "socket.pids"
    parents |= {int(stub.read_text()): int(stub.name) for stub in stubs.glob("*")}
    found, wave = [], {server._guard.pid}
    while wave:
        wave = {child for child, parent in parents.items() if parent in wave}
        found += wave
    return found


def working(url: str) -> int:
    """Requests that the server runs or has waiting."""
    (load,) = httpx.get(f"{url}/v1/loads", timeout=10.0).json()["loads"]
    return int(load["num_running_reqs"]) + int(load["queues"]["waiting"])


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """The seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.05)
    return time.monotonic() - start
