"""What can go wrong with a reward service: retried where that helps, otherwise dropped or stopped, always in time."""

from __future__ import annotations

import gzip
import json
import math
import socket
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from torchrun import free_port

sys.path.insert(0, str(Path(__file__).parent))
from contract_server import ContractServer, Handler, true_reward

from megatron_rl.batch import Prompt, Sample
from megatron_rl.rewards import NoReward, Reward, RewardError, build_service
from megatron_rl.rewards.service import service_client

TIMEOUT = 0.4
OPTIONS = {"timeout": TIMEOUT, "retries": 2, "retry_wait": 0.01, "batch_size": 4, "max_response_bytes": 20_000}
LONGEST = 8.0  # seconds that any of these may take, on a busy machine


def samples(count: int) -> list[Sample]:
    return [Sample(Prompt([1], text="q", index=i), [2], [0.0], response_text="a" * i) for i in range(count)]


def expected(batch: list[Sample]) -> list[float]:
    return [true_reward(s.prompt.text + s.response_text) for s in batch]


@pytest.fixture
def server() -> Iterator[ContractServer]:
    server = ContractServer()
    yield server
    server.close()


def service(server: ContractServer, **options: object) -> Reward:
    return build_service(server.url + "/sglang", "sglang", **(OPTIONS | options))


def hangs(handler: Handler) -> None:
    handler.server.released.wait(20)
    handler.close_connection = True


def drips(handler: Handler) -> None:
    """A byte now and then: each read is in time, the answer never comes."""
    handler.send_bytes(200, b"[", claimed=1000)
    while not handler.server.released.wait(TIMEOUT / 4):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def dies_mid_answer(handler: Handler) -> None:
    handler.send_bytes(200, b'[{"embedding": [1.', claimed=500)
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def resets(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


FAULTS: dict[str, Callable[[Handler], None]] = {
    "hangs": hangs,
    "drips": drips,
    "status 500": lambda handler: handler.send(500, {"error": "oops"}),
    "overloaded": lambda handler: handler.send(429, {"error": "overloaded"}),
    "malformed JSON": lambda handler: handler.send_bytes(200, b'[{"embedding": [1.0]'),
    "dies mid answer": dies_mid_answer,
    "closes the connection": resets,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_retried_and_every_sample_gets_its_reward(server: ContractServer, fault: str) -> None:
    server.fault = lambda handler, number: number == 1 and FAULTS[fault](handler) is None
    batch, started = samples(7), time.monotonic()
    reward = service(server)
    assert reward(batch) == pytest.approx(expected(batch))
    assert time.monotonic() - started < LONGEST
    metrics = reward.take_metrics()
    assert metrics["reward_service/sglang/retries_count"] >= 1  # a busy machine may miss the short time limit again
    assert metrics["reward_service/sglang/dropped_count"] == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_stops_the_run_in_time_and_names_a_sample(server: ContractServer, fault: str) -> None:
    server.fault = lambda handler, number: FAULTS[fault](handler) is None
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"is missing for 7 of 7 samples.*sample: prompt 0 'q'"):
        service(server)(samples(7))
    assert time.monotonic() - started < LONGEST
    assert len(server.bodies) == 2 * 3  # two requests, three attempts each


@pytest.mark.parametrize("fault", FAULTS)
def test_dropped_samples_are_no_rewards_and_never_numbers(server: ContractServer, fault: str) -> None:
    def on_long_texts(handler: Handler, number: int) -> bool:
        return "aaaa" in str(server.bodies[number - 1]) and FAULTS[fault](handler) is None

    server.fault = on_long_texts
    batch = samples(7)
    reward = service(server, on_failure="drop", retries=1)
    rewards = reward(batch)
    assert rewards[:4] == pytest.approx(expected(batch)[:4])
    assert all(isinstance(value, NoReward) and value.reason for value in rewards[4:])
    assert [sample.reward_parts for sample in batch[4:]] == [{}] * 3
    assert reward.take_metrics()["reward_service/sglang/dropped_count"] == 3


def test_nobody_listens(server: ContractServer) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"ConnectError"):
        build_service(f"http://127.0.0.1:{free_port()}", "sglang", **OPTIONS)(samples(2))
    assert time.monotonic() - started < LONGEST


def test_a_server_that_comes_back_is_used_again(server: ContractServer) -> None:
    down = [True]
    server.fault = lambda handler, number: down[0] and FAULTS["status 500"](handler) is None
    reward = service(server, on_failure="drop", retries=0)
    assert all(isinstance(value, NoReward) for value in reward(samples(3)))
    down[0] = False
    assert reward(samples(3)) == pytest.approx(expected(samples(3)))


def test_an_oversized_answer_is_not_read_to_its_end_nor_asked_for_again(server: ContractServer) -> None:
    def endless(handler: Handler, number: int) -> bool:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        sent = 0
        while not server.released.is_set() and sent < 200_000_000:
            handler.wfile.write(b" " * 10_000)
            sent += 10_000
        return True

    server.fault = endless
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"more than 20000 bytes \(max_response_bytes\)"):
        service(server)(samples(3))
    assert len(server.bodies) == 1
    assert time.monotonic() - started < LONGEST


def test_only_the_rejected_sample_of_a_batch_is_lost(server: ContractServer) -> None:
    server.too_long = 5
    batch = samples(8)
    batch[2].response_text = "far too long"
    batch = batch[:4]
    reward = service(server, on_failure="drop")
    rewards = reward(batch)
    assert isinstance(rewards[2], NoReward)
    assert "status 422" in rewards[2].reason
    assert [rewards[i] for i in (0, 1, 3)] == pytest.approx([expected(batch)[i] for i in (0, 1, 3)])
    assert reward.take_metrics()["reward_service/sglang/retries_count"] == 0
    with pytest.raises(RewardError, match="sample: prompt 2 'q', response 'far too long'"):
        service(server)(batch)


def test_a_server_of_another_kind_is_an_error_whatever_on_failure_says(server: ContractServer) -> None:
    with pytest.raises(RewardError, match=r"status 404.*is the kind of service right\?"):
        build_service(server.url, "vllm", model="rm", on_failure="drop", **OPTIONS)(samples(2))
    assert len(server.bodies) == 1


def test_redirects_are_not_followed(server: ContractServer) -> None:
    def redirect(handler: Handler, number: int) -> bool:
        handler.send_response(307)
        handler.send_header("Location", "http://127.0.0.1:1/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    server.fault = redirect
    with pytest.raises(RewardError, match="status 307"):
        service(server, on_failure="drop")(samples(1))
    assert len(server.bodies) == 1


def of_rows(*rows: object) -> bytes:
    return json.dumps(rows).encode()


# an answer of status 200 to two samples -> part of the reason
MALFORMED: dict[str, tuple[bytes, str]] = {
    "deep JSON": (b"[" * 100_000 + b"]" * 100_000, "answer with JSON"),
    "JSON as deep as it can be": (b"[" * 900 + b"]" * 900, "expected a list of 2 results"),
    "a number of 400 digits": (b'[{"embedding": [%s]}, {"embedding": [%s]}]' % ((b"9" * 400,) * 2), "digits"),
    "a number of 5,000 digits": (b'[{"embedding": [%s]}, {"embedding": [1]}]' % (b"9" * 5000), "answer with JSON"),
    "too few": (of_rows({"embedding": [1.0]}), "expected a list of 2 results"),
    "too many": (of_rows(*[{"embedding": [1.0]}] * 3), "expected a list of 2 results"),
    "an object": (b'{"error": "odd"}', "expected a list of 2 results"),
    "no objects": (of_rows(1.0, 2.0), "expected numbers"),
    "nothing in them": (of_rows({}, {}), "expected numbers"),
    "empty lists": (of_rows(*[{"embedding": []}] * 2), "expected numbers"),
    "texts": (of_rows(*[{"embedding": ["x"]}] * 2), "expected numbers"),
    "truth values": (of_rows(*[{"embedding": [True]}] * 2), "expected numbers"),
    "no numbers": (of_rows(*[{"embedding": [math.nan]}] * 2), "it is nan"),
    "UTF-16": (of_rows({"embedding": [1.0]}).decode().encode("utf-16")[:-1], "answer with JSON"),
    "nothing": (b"", "answer with JSON"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_an_answer_of_another_form_is_no_answer(server: ContractServer, case: str) -> None:
    content, reason = MALFORMED[case]
    wrong = [True]
    server.fault = lambda handler, number: wrong[0] and handler.send_bytes(200, content) is None
    options = {"retries": 1, "max_response_bytes": 1 << 20}
    with pytest.raises(RewardError, match=rf"is missing for 2 of 2 samples: .*{reason}.*; sample: prompt 0 'q'"):
        service(server, **options)(samples(2))
    assert len(server.bodies) == 2  # it was tried again
    dropping = service(server, on_failure="drop", **options)
    assert all(isinstance(value, NoReward) and reason in value.reason for value in dropping(samples(2)))
    wrong[0] = False
    assert dropping(samples(2)) == pytest.approx(expected(samples(2)))


def test_only_the_sample_whose_reward_is_no_number_is_lost(server: ContractServer) -> None:
    rows = [{"embedding": [value]} for value in (1.0, math.inf, None, 10**400, 2.5)]
    server.plain["/sglang/classify"] = lambda body: rows
    options = {"batch_size": 5, "retries": 0}
    with pytest.raises(RewardError, match=r"is missing for 3 of 5 samples: it is inf.*sample: prompt 1 'q'"):
        service(server, **options)(samples(5))
    rewards = service(server, on_failure="drop", **options)(samples(5))
    assert [rewards[0], rewards[4]] == [1.0, 2.5]
    assert all(isinstance(value, NoReward) for value in rewards[1:4])


CHAT = {"model": "judge", "rubric": "x"}
LISTS = {"request": {"items": "{texts}"}, "path": "scores[*]"}
# kind, its options, an answer to two samples (or, where a request holds one sample, to each)
OF_EACH_KIND: dict[str, tuple[str, dict[str, object], object]] = {
    "an empty index": ("vllm", {"model": "rm"}, {"data": [{"probs": [1.0]}, {"probs": [2.0]}]}),
    "an index that is none": ("vllm", {"model": "rm"}, {"data": [{"index": [0], "probs": [1.0]}] * 2}),
    "one index twice": ("vllm", {"model": "rm"}, {"data": [{"index": 0, "probs": [1.0]}] * 2}),
    "rows that are no objects": ("vllm", {"model": "rm"}, {"data": [0, 1]}),
    "no data": ("vllm", {"model": "rm"}, {"data": None}),
    "a list too short": ("vllm", {"model": "rm"}, {"data": [{"index": 0, "probs": [1.0]}]}),
    "no list of classes": ("tei", {}, [{"label": "good", "score": 1.0}] * 2),
    "a label that is none": ("tei", {}, [[{"label": ["good"], "score": 1.0}]] * 2),
    "a class without a score": ("tei", {"label": "good"}, [[{"label": "good"}]] * 2),
    "another path": ("http", {}, {"value": 1.0}),
    "a number in place of an object": ("http", {"path": "a.0.score"}, {"a": [1]}),
    "lists too short": ("http", LISTS, {"scores": [1.0]}),
    "no list": ("http", LISTS, {"scores": 1.0}),
    "no choices": ("judge", CHAT, {"choices": []}),
    "a message that is none": ("judge", CHAT, {"choices": [{"message": "Score: 5"}]}),
    "a verdict that is no text": ("judge", CHAT, {"choices": [{"message": {"content": {"a": 1}}}]}),
}


@pytest.mark.parametrize("case", OF_EACH_KIND)
def test_every_kind_of_service_takes_a_wrong_form_for_no_answer(server: ContractServer, case: str) -> None:
    kind, options, answer = OF_EACH_KIND[case]
    server.fault = lambda handler, number: handler.send(200, answer) is None
    asked = OPTIONS | {"retries": 0} | options
    with pytest.raises(RewardError, match="is missing for 2 of 2 samples"):
        build_service(server.url, kind, **asked)(samples(2))
    rewards = build_service(server.url, kind, on_failure="drop", **asked)(samples(2))
    assert all(isinstance(value, NoReward) for value in rewards)


def send_packed(handler: Handler, content: bytes) -> bool:
    """Answer with ``content``, which is said to be gzip."""
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)
    return True


def test_what_is_not_the_gzip_it_claims_is_no_answer(server: ContractServer) -> None:
    good = gzip.compress(of_rows({"embedding": [1.0]}, {"embedding": [2.0]}))
    contents = [b"not packed at all", good[: len(good) // 2], good]

    def packed(handler: Handler, number: int) -> bool:
        return send_packed(handler, contents[min(number, 3) - 1])

    server.fault = packed
    assert service(server)(samples(2)) == [1.0, 2.0]
    assert len(server.bodies) == 3


def test_what_is_packed_is_measured_unpacked(server: ContractServer) -> None:
    content = gzip.compress(b" " * 10_000_000)

    server.fault = lambda handler, number: send_packed(handler, content)
    with pytest.raises(RewardError, match="more than 20000 bytes"):
        service(server)(samples(1))


def asked_again_after(server: ContractServer, header: str) -> float:
    """Seconds between a refusal with this Retry-After and the next attempt."""
    times: list[float] = []

    def busy(handler: Handler, number: int) -> bool:
        times.append(time.monotonic())
        if len(times) > 1:
            return False
        handler.send_response(503 if number % 2 else 429)
        handler.send_header("Retry-After", header)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    server.fault = busy
    assert service(server, timeout=5.0)(samples(1)) == pytest.approx(expected(samples(1)))
    return times[1] - times[0]


def test_a_server_that_says_when_to_ask_again_is_asked_then(server: ContractServer) -> None:
    assert asked_again_after(server, "1") >= 1.0
    assert asked_again_after(server, formatdate(time.time() + 3, usegmt=True)) >= 1.0  # dates have whole seconds


@pytest.mark.parametrize(
    "header", ["86400", "1e300", formatdate(time.time() + 86400 * 365, usegmt=True), "Fri, 31 Dec 9999 23:59:59 GMT"],
    ids=["a day", "for ever", "a year", "the end of time"],
)  # fmt: skip
def test_nobody_waits_longer_than_the_cap(server: ContractServer, header: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_client, "LONGEST_RETRY_AFTER", 0.5)
    assert 0.5 <= asked_again_after(server, header) < LONGEST


@pytest.mark.parametrize("header", ["nan", "inf", "-5", "soon", "Thu, 01 Jan 1970 00:00:00 GMT", ", 99 Foo"])
def test_a_wish_that_makes_no_sense_changes_nothing(server: ContractServer, header: str) -> None:
    assert asked_again_after(server, header) < LONGEST
