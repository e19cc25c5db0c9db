"""What can go wrong with a reward service: retried where that helps, otherwise dropped or stopped, always in time."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from contract_server import ContractServer, Handler, true_reward

from megatron_rl.batch import Prompt, Sample
from megatron_rl.rewards import NoReward, Reward, RewardError, build_service

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
    with pytest.raises(RewardError, match=r"could not be had for 7 of 7 samples.*sample: prompt 0 'q'"):
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"ConnectError"):
        build_service(f"http://127.0.0.1:{port}", "sglang", **OPTIONS)(samples(2))
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
        service(server)(samples(1))
