"""The SGLang engine over stand-in servers: the contract of all engines, and no fault loses or doubles an answer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from rollout.engine_contract import EngineContract, Loaded
from rollout.over_stand_ins import ARCHITECTURE, MODEL, SHARDS, SHORT, eventually, last_tokens, loaded_over, two
from rollout.rollout_models import Cutter, layout_of, local_engine
from rollout.sglang_stand_in import Fault, StandIn, of_engine

from megatron_rl.config import ConfigError
from megatron_rl.models import Experts, rollout_layout
from megatron_rl.rollout import ENGINES, SamplingParams, SGLangEngine, WeightCheck
from megatron_rl.rollout.sglang.sglang_client import ABORT_SECONDS

__all__ = ["two"]  # a fixture

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    shards = Cutter(ARCHITECTURE, MODEL.state_dict()).cut()
    model = local_engine(MODEL, eos_token_ids=[2])
    server = StandIn(of_engine(model), load=lambda weights: model.load_shards(weights, 1))
    layout = rollout_layout(ARCHITECTURE, 1, [[0]])
    options = {"urls": [server.url], "eos_token_ids": [2]}
    with SGLangEngine(ARCHITECTURE, layout, dtype=torch.float32, **options) as engine:  # type: ignore[arg-type]
        engine.load_shards(shards, 7)
        yield Loaded(engine, MODEL, shards, vocab=100, eos=2)
    server.die()


class TestSGLangEngineKeepsTheContract(EngineContract):
    """See `EngineContract`."""


def test_every_request_is_answered_once_when_one_of_two_servers_is_killed_halfway(two: list[StandIn]) -> None:
    two[0].die_after = 120
    counted: list[int] = []
    with loaded_over(*two, concurrency=250, recovery_timeout=30.0) as engine:
        prompts = [[5, 3 + i % 90] for i in range(500)]
        answers = engine.generate(prompts, SHORT, progress=lambda done, total: counted.append(done))
    assert [group[0].token_ids for group in answers] == [[prompt[-1]] * 4 for prompt in prompts]
    assert counted == list(range(1, 501))
    assert two[0].gone.is_set()
    assert len(set(two[1].answered)) == len(two[1].answered) <= 500 - 100


@pytest.mark.parametrize("fault", ["500", "malformed", "drop", "wrong tokens"])
def test_a_server_that_answers_wrongly_costs_a_retry_and_no_sample(two: list[StandIn], fault: Fault) -> None:
    with loaded_over(*two) as engine:
        for server in two:
            server.faults.extend([fault] * 3)
        assert last_tokens(engine, 40, n=2) == list(range(40))
        assert not two[0].faults
        assert last_tokens(engine, 10) == list(range(10))


def test_a_server_that_refuses_from_the_start_gets_no_request(two: list[StandIn]) -> None:
    two[1].die()
    with loaded_over(*two) as engine:
        assert last_tokens(engine, 20) == list(range(20))
    assert len(two[0].answered) == 20


def test_a_server_that_hangs_is_given_up_by_its_health(two: list[StandIn]) -> None:
    with loaded_over(*two, health_interval=0.2) as engine:
        two[0].faults.append("hang")
        assert last_tokens(engine, 30) == list(range(30))
    assert len(two[1].answered) == 30


def test_a_request_that_takes_too_long_is_aborted_and_goes_elsewhere(two: list[StandIn]) -> None:
    with loaded_over(*two, request_timeout=3.0) as engine:
        two[0].faults.append("hang")
        assert last_tokens(engine, 10) == list(range(10))
    assert len(two[0].aborted) == len(two[0].started_with)


@pytest.mark.parametrize("fault", ["drip", "endless"])
def test_an_answer_without_an_end_goes_elsewhere(two: list[StandIn], fault: Fault) -> None:
    began = time.monotonic()
    with loaded_over(*two, request_timeout=2.0) as engine:
        two[0].faults.append(fault)
        assert last_tokens(engine, 10) == list(range(10))
    assert not two[0].faults
    assert time.monotonic() - began < 15.0


def test_a_server_that_dies_while_it_generates_loses_nothing(two: list[StandIn]) -> None:
    with loaded_over(*two) as engine:
        two[1].faults.append("die")
        assert last_tokens(engine, 30, n=3) == list(range(30))


@pytest.mark.parametrize("comes_back_with", ["default", "1"])
def test_a_server_that_comes_back_with_old_weights_gets_the_newest_before_traffic(comes_back_with: str) -> None:
    first, slow = StandIn(), threading.Event()
    engine = loaded_over(first, version=1)
    engine.load_shards({"model.norm.weight": torch.full((32,), 2.0)}, 2)
    first.generate = lambda prompt, params: (slow.wait(10) and None) or ([3] * 4, [-0.5] * 4, {"type": "length"})
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(engine.generate([[5, 6]] * 4, SHORT)))
    asking.start()
    eventually(lambda: len(first.started_with) == 4)
    first.die()
    slow.set()
    second = StandIn(port=first.port, weight_version=comes_back_with)
    asking.join(30)
    engine.close()
    second.die()
    assert [group[0].policy_version for group in answers[0]] == [2] * 4
    assert set(second.started_with) == {"2"}
    assert torch.equal(second.weights["model.norm.weight"], torch.full((32,), 2.0))


def test_answers_by_weights_that_nobody_pushed_are_thrown_away_and_the_server_loaded_anew(
    two: list[StandIn],
) -> None:
    with loaded_over(*two, version=5) as engine:
        two[0].weight_version = "default"  # restarted between two of our requests
        answers = engine.generate([[5, 6]] * 20, SHORT)
        assert {group[0].policy_version for group in answers} == {5}
        assert two[0].weight_version == "5"


def test_when_no_server_is_left_the_error_says_what_was_tried(two: list[StandIn]) -> None:
    with loaded_over(*two, recovery_timeout=1.0, attempts=3) as engine:
        for server in two:
            server.die()
        with pytest.raises(RuntimeError, match=r"no server was ready for 1 s: http://127.*down.*failures"):
            engine.generate([[5, 6]], SHORT)


def test_a_request_the_server_calls_wrong_is_not_tried_again(two: list[StandIn]) -> None:
    with loaded_over(*two) as engine:
        for member in engine._membership.members:  # our own requests are never wrong
            member.client.generate = lambda body, limit, client=member.client: client.post("/generate", {"rid": ["a"]})
        with pytest.raises(ValueError, match="answered 400"):
            engine.generate([[5, 6]], SHORT)


def test_requests_are_spread_by_load_and_the_limit_holds(two: list[StandIn]) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def slowly(prompt: list[int], params: dict[str, Any]) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return [prompt[-1]] * 4, [-0.5] * 4, {"type": "length", "length": 4}

    for server in two:
        server.generate = slowly
    with loaded_over(*two, concurrency=3) as engine:
        engine.generate([[5, 6]] * 60, SHORT)
    assert most <= 6
    assert all(len(server.answered) >= 20 for server in two)


def test_samples_of_one_prompt_meet_one_server(two: list[StandIn]) -> None:
    with loaded_over(*two) as engine:
        engine.generate([[5, 6], [5, 7]], SamplingParams(n=6, max_tokens=2))
    assert [len(server.answered) for server in two] == [6, 6]


def asking_forever(engine: SGLangEngine, servers: list[StandIn], failures: list[BaseException]) -> threading.Thread:
    """A thread that waits for 100 answers of 2 samples, which never come, and tells how it ended."""

    def ask() -> None:
        try:
            engine.generate([[5, 6]] * 100, SamplingParams(n=2, max_tokens=4))
        except BaseException as error:
            failures.append(error)

    for server in servers:
        server.faults.append("hang")
    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: sum(len(server.started_with) for server in servers) == 100)
    return asking


def test_closing_aborts_every_sample_that_runs_and_says_so_to_who_waits(two: list[StandIn]) -> None:
    failures: list[BaseException] = []
    engine = loaded_over(*two, concurrency=100)
    asking = asking_forever(engine, two, failures)
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < ABORT_SECONDS, "aborts did not get through"
    asking.join(20)
    assert "closed while it generated" in str(failures[0])
    assert len({*two[0].aborted, *two[1].aborted}) == 200


def test_an_interrupt_aborts_every_sample_that_runs_before_it_goes_on(two: list[StandIn]) -> None:
    failures: list[BaseException] = []

    def interrupted(seconds: float) -> None:
        if sum(len(server.started_with) for server in two) == 100:
            raise KeyboardInterrupt

    with loaded_over(*two, concurrency=100) as engine:
        engine.replica.heartbeat = interrupted  # type: ignore[method-assign]
        asking_forever(engine, two, failures).join(20)
        aborted = {*two[0].aborted, *two[1].aborted}
    assert isinstance(failures[0], KeyboardInterrupt)
    assert len(aborted) == 200


def test_servers_whose_weights_were_changed_behind_our_back_are_named(two: list[StandIn]) -> None:
    with loaded_over(*two, version=3) as engine:
        assert engine.verify_weights() == WeightCheck(2)
        two[1].weights["model.norm.weight"] = torch.zeros(32)
        check = engine.verify_weights()
        assert check.compared == 2
        assert [f"{two[1].url} no longer holds what was pushed: model.norm.weight on rank 0"] == list(check.faults)
        two[1].weight_version = "2"
        assert f"{two[1].url} serves weights that are named '2', pushed was 3" in engine.verify_weights().faults
        two[0].die()
        assert engine.verify_weights().compared == 1
        engine.sleep()
        assert engine.verify_weights() == WeightCheck()


def test_a_sleeping_engine_refuses_and_needs_new_weights(two: list[StandIn]) -> None:
    with loaded_over(*two) as engine:
        engine.sleep()
        assert "/release_memory_occupation" in two[0].calls
        with pytest.raises(RuntimeError, match="sleep"):
            engine.begin_update()
        engine.wake()
        with pytest.raises(RuntimeError, match="holds no weights"):
            engine.generate([[5, 6]], SHORT)
        engine.load_shards(SHARDS, 2)
        engine.sleep(["kv_cache"])
        with pytest.raises(RuntimeError, match=r"call wake\(\)"):
            engine.generate([[5, 6]], SHORT)
        engine.wake()
        assert engine.generate([[5, 6]], SHORT)[0][0].policy_version == 2


def test_a_server_of_another_version_is_refused_with_the_supported_range() -> None:
    server = StandIn(sglang_version="0.4.9")
    with pytest.raises(ConfigError, match=r"0\.4\.9.*0\.5\.21 or later, before 0\.6"):
        loaded_over(server)
    server.die()


def test_an_attached_server_of_another_tensor_parallelism_is_refused() -> None:
    server = StandIn(tp=2)
    with pytest.raises(ConfigError, match=r"tp=2.*expected 1"):
        loaded_over(server)
    server.die()


def test_dense_layers_among_experts_are_refused() -> None:
    mixed = replace(ARCHITECTURE, family="qwen3_moe", experts=Experts(4, 2, 24, dense_layers=(1,)))
    with pytest.raises(ConfigError, match="layers 1 of this qwen3_moe have a dense MLP"):
        SGLangEngine(mixed, layout_of(SHARDS), urls=["http://x"])
    SGLangEngine.check_model(replace(mixed, experts=Experts(4, 2, 24)))


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'urls'"):
        SGLangEngine(ARCHITECTURE, layout_of(SHARDS), url=["http://x"])
    with pytest.raises(ConfigError, match=r"delivery='fax' is not one of \['direct'"):
        SGLangEngine.check_options({"delivery": "fax"})
    with pytest.raises(ConfigError, match="no Python at /nowhere"):
        SGLangEngine.check_options({"server": {"python": "/nowhere"}})
    two_replicas = rollout_layout(ARCHITECTURE, 1, [[0], [1]])
    with pytest.raises(ConfigError, match="1 urls for 2 rollout replicas"):
        SGLangEngine(ARCHITECTURE, two_replicas, urls=["http://x"])
    assert ENGINES["sglang"] is SGLangEngine


def test_waiting_for_a_server_that_is_not_there_is_said_and_ends(caplog) -> None:
    options = {"urls": ["http://127.0.0.1:9"], "recovery_timeout": 4.0}
    engine = SGLangEngine(ARCHITECTURE, layout_of(SHARDS), dtype=torch.float32, **options)
    with contextlib.closing(engine), pytest.raises(RuntimeError, match=r"did not answer within 4 s: .*127\.0\.0\.1:9"):
        engine.load_shards(SHARDS, 1)
    said = [record for record in caplog.records if "more for servers" in record.message]
    assert len(said) == 1
    assert "127.0.0.1:9" in said[0].message
    assert said[0].levelname == "WARNING"
