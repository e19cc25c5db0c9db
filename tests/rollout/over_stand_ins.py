"""SGLang engines over stand-in servers, for tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rollout.rollout_models import architecture_of, layout_of, random_model
from rollout.sglang_stand_in import StandIn

from megatron_rl.rollout import SamplingParams, SGLangEngine

MODEL = random_model("llama")
ARCHITECTURE = architecture_of(MODEL.config)
SHARDS = {"model.norm.weight": torch.ones(32)}
SHORT = SamplingParams(max_tokens=4)


def attached(*servers: StandIn, **options: Any) -> SGLangEngine:
    """An engine over stand-ins that holds one tensor, not loaded yet."""
    quick = {"recovery_timeout": 20.0, "request_timeout": 20.0} | options
    urls = [server.url for server in servers]
    return SGLangEngine(ARCHITECTURE, layout_of(SHARDS), dtype=torch.float32, urls=urls, **quick)


def loaded_over(*servers: StandIn, version: int = 1, **options: Any) -> SGLangEngine:
    engine = attached(*servers, **options)
    engine.load_shards(SHARDS, version)
    return engine


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last_tokens(engine: SGLangEngine, count: int, **params: Any) -> list[int]:
    """Ask ``count`` prompts whose answers tell which prompt they are to, and return what was asked back."""
    prompts = [[5, 3 + i % 90] for i in range(count)]
    answers = engine.generate(prompts, SamplingParams(max_tokens=3, **params))
    assert all(len(group) == params.get("n", 1) for group in answers)
    return [group[0].token_ids[0] - 3 for group in answers]


@pytest.fixture
def two() -> Iterator[list[StandIn]]:
    servers = [StandIn(), StandIn()]
    yield servers
    for server in servers:
        server.die()
