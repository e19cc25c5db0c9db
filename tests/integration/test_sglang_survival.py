"""Real servers that are killed, and requests that nobody wants any more."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import torch
from integration.servers import MODEL, attached, members_of, processes_of, wait_for, working
from rollout.engine_contract import Loaded
from rollout.rollout_models import reference_logprobs

from megatron_rl.rollout import Completion, SamplingParams, SGLangEngine, WeightCheck
from megatron_rl.rollout.sglang.membership import Member
from megatron_rl.rollout.sglang.sglang_client import Json, SGLangClient
from megatron_rl.rollout.sglang.streaming import PartialOutput

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
PROMPTS = [[5, 3 + i % 90, 3 + i // 90] for i in range(500)]
HOPELESS = SamplingParams(max_tokens=490, ignore_eos=True)  # 200 of them keep two servers busy for half a minute
ABORT_SECONDS = 3.0


def check(prompt: list[int], completion: Completion, version: int) -> None:
    assert completion.policy_version_spans == [(version, len(completion.token_ids))]
    expected = reference_logprobs(MODEL, prompt, completion.token_ids)
    assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-3


def kill(member: Member) -> None:
    for process in processes_of(member.server):
        os.kill(process, signal.SIGKILL)


# --- aborts


def ask_in_vain(engine: SGLangEngine, failures: list[BaseException], **more: Any) -> threading.Thread:
    def ask() -> None:
        try:
            engine.generate(PROMPTS[:200], HOPELESS, **more)
        except BaseException as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    return asking


def wait_for_all(urls: Sequence[str], requests: int) -> None:
    """Until each server has got so many: it has them all, or fewer than before, for the first end long after the last
    has come."""
    most = dict.fromkeys(urls, 0)
    full: set[str] = set()

    def all_have_come() -> bool:
        for url in set(urls) - full:
            number = working(url)
            if number == requests or number < most[url]:
                full.add(url)
            most[url] = max(most[url], number)
        return len(full) == len(urls)

    wait_for(all_have_come, 60.0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["interrupt", "failure", "close"])
def test_what_ends_early_leaves_no_request_on_the_servers(loaded: Loaded, end: str, stream: bool) -> None:
    urls = loaded.engine.urls  # type: ignore[attr-defined]
    failures: list[BaseException] = []
    busy = threading.Event()
    with attached(loaded, stream=stream, concurrency=100) as engine:
        engine.load_shards(loaded.shards, 7)

        def strike(*_: object) -> None:
            if busy.is_set():
                raise KeyboardInterrupt if end == "interrupt" else ValueError("a step that failed")

        if end != "close":
            engine.replica.heartbeat = strike  # type: ignore[method-assign]
        asking = ask_in_vain(engine, failures)
        # All have come: one that came behind its abort would end only when the server looks for its client.
        wait_for_all(urls, 100)
        busy.set()
        if end == "close":
            engine.close()
        asking.join(30.0)
        assert not asking.is_alive()
        took = wait_for(lambda: not any(map(working, urls)), ABORT_SECONDS)
    expected = {"interrupt": KeyboardInterrupt, "failure": ValueError, "close": RuntimeError}[end]
    assert isinstance(failures[0], expected)
    print(f"{end}, stream={stream}: servers idle {took:.2f} s after the end")


def test_a_server_finds_out_by_itself_that_its_client_is_gone(loaded: Loaded) -> None:
    url = loaded.engine.urls[0]  # type: ignore[attr-defined]
    body = {"input_ids": PROMPTS[:200], "sampling_params": {"max_new_tokens": 490, "ignore_eos": True}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/generate", json=body, timeout=2.0)
    took = wait_for(lambda: working(url) == 0, 15.0)
    print(f"idle {took:.2f} s after the client was gone")


# --- dead servers


class Ledger:
    """Says, of each request to a server that was started again, which weights the server held when it came."""

    def __init__(self, member: Member) -> None:
        self.held: list[str] = []
        make = member.make_client
        assert make is not None

        def make_watched(url: str) -> SGLangClient:
            client = make(url)
            generate = client.generate

            async def watched(body: Json, max_bytes: int) -> Any:
                self.held.append(await client.weight_version())
                return await generate(body, max_bytes)

            client.generate = watched  # type: ignore[method-assign]
            return client

        member.make_client = make_watched


def test_500_requests_over_two_servers_with_one_killed_halfway_are_answered_exactly_once(loaded: Loaded) -> None:
    engine, counted = loaded.engine, list[int]()
    assert isinstance(engine, SGLangEngine)
    victim, other = members_of(engine)
    wait_for_both(loaded)
    ledger, urls = Ledger(victim), engine.urls
    for member in members_of(engine):
        member.limit = 250  # all at a time
    engine.load_shards(loaded.shards, 9)
    started = victim.client

    def progress(done: int, total: int) -> None:
        counted.append(done)
        if done == 250:
            kill(victim)

    answers = engine.generate(PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True), progress=progress)
    assert counted == list(range(1, 501))
    assert [len(group) for group in answers] == [1] * 500
    for prompt, (completion,) in zip(PROMPTS, answers, strict=True):
        assert len(completion.token_ids) == 8
        check(prompt, completion, 9)
    assert victim.failures, "the server had no request when it was killed"
    assert not other.failures

    def is_back() -> bool:
        """The dead server is started anew while requests are answered; look at all of the answers meanwhile."""
        for prompt, (completion,) in zip(
            PROMPTS, engine.generate(PROMPTS[:64], SamplingParams(max_tokens=8)), strict=False
        ):
            check(prompt, completion, 9)
        return len(ledger.held) > 0

    took = wait_for(is_back, 300.0)
    print(f"{len(victim.failures)} failures, restarted and serving after {took:.1f} s")
    assert victim.client is not started
    assert set(ledger.held) == {"9"}
    assert set(engine.urls) != set(urls)
    assert engine.verify_weights() == WeightCheck(2)


def wait_for_both(loaded: Loaded) -> None:
    """Whatever an earlier test left: a push starts what has ended, and a server of ours that starts is waited for."""

    def both_answer() -> bool:
        loaded.engine.load_shards(loaded.shards, 8)
        servers = [member.server for member in members_of(loaded.engine)]  # type: ignore[arg-type]
        return all(server is not None and server.is_ready() for server in servers)

    wait_for(both_answer, 300.0)


def test_tokens_that_had_streamed_survive_a_killed_server(
    loaded: Loaded, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(loaded.engine, SGLangEngine)
    wait_for_both(loaded)
    victim = members_of(loaded.engine)[1]
    long, killed, take = set[int](), threading.Event(), PartialOutput.take

    def take_and_kill(piece: PartialOutput, chunk: Json) -> None:
        take(piece, chunk)
        if piece.certain >= 100:
            long.add(id(piece))
        if len(long) >= 12 and not killed.is_set():  # of 8 on each server
            killed.set()
            kill(victim)

    monkeypatch.setattr(PartialOutput, "take", take_and_kill)
    with attached(loaded, stream=True) as engine, caplog.at_level(logging.WARNING):
        engine.load_shards(loaded.shards, 10)
        answers = engine.generate(PROMPTS[:8], SamplingParams(n=2, max_tokens=400, ignore_eos=True))
    for prompt, group in zip(PROMPTS, answers, strict=False):
        for completion in group:
            assert len(completion.token_ids) == 400
            check(prompt, completion, 10)
    kept = [record.args[1] for record in caplog.records if "resumes after" in record.message]  # type: ignore[index]
    assert len(kept) == 4, "half of the prompts were on the server"
    assert sum(kept) > 400  # type: ignore[arg-type]
    print(f"tokens kept of 4 prompts with 2 samples each: {kept}")
