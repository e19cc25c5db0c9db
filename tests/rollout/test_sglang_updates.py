"""Updates of servers' weights: what goes to the servers, what runs meanwhile, and what is served when one fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from rollout.over_stand_ins import SHARDS, SHORT, eventually, last_tokens, loaded_over, two
from rollout.sglang_stand_in import Generate, StandIn, counting

from megatron_rl.rollout import SamplingParams

__all__ = ["two"]  # a fixture

pytestmark = pytest.mark.timeout(60)


def until_the_push(server: StandIn) -> Generate:
    return lambda prompt, params: (eventually(lambda: server.weight_version == "2"), counting(prompt, params))[1]


def test_an_update_while_requests_run_pauses_them_and_both_versions_are_reported(two: list[StandIn]) -> None:
    with loaded_over(*two, version=1, pause="in_place") as engine:
        for server in two:
            server.generate = until_the_push(server)
        answers: list[Any] = []
        params = SamplingParams(max_tokens=8)
        asking = threading.Thread(target=lambda: answers.append(engine.generate([[5, 6]] * 4, params)))
        asking.start()
        eventually(lambda: sum(len(server.started_with) for server in two) == 4)
        engine.load_shards(SHARDS, 2)
        asking.join(20)
        engine.generate([[5, 6]] * 4, SHORT)
    assert all(group[0].policy_version_spans == [(1, 4), (2, 4)] for group in answers[0])
    assert all(group[0].policy_version == 2 for group in answers[0])
    assert two[0].cache_keys == {"weights-1", "weights-2"}
    assert "/flush_cache" not in two[0].calls


def test_submitted_prompts_go_on_over_an_update_and_are_watched_by_one_task(two: list[StandIn]) -> None:
    looks = list[str]()

    def counted(server: StandIn) -> Callable[[Any], tuple[int, Any]]:
        look = server._health
        return lambda body: (looks.append(server.url), look(body))[1]

    with loaded_over(*two, version=1, pause="in_place", health_interval=0.1) as engine:
        for server in two:
            server.generate = until_the_push(server)
            server._health = counted(server)  # type: ignore[method-assign]
        futures = engine.submit([[5, 6]] * 16, SamplingParams(max_tokens=8), range(16))
        eventually(lambda: sum(len(server.started_with) for server in two) == 16)
        eventually(lambda: len(looks) >= 4)
        assert len(looks) <= 6, "each prompt had the servers examined"
        assert not any(future.done() for future in futures)
        engine.load_shards(SHARDS, 2)
        answers = [future.result(20) for future in futures]
        assert engine.generate([[5, 6]], SHORT)[0][0].policy_version == 2
    assert all(group[0].policy_version_spans == [(1, 4), (2, 4)] for group in answers)


def test_an_update_goes_through_pause_session_version_and_continue(two: list[StandIn]) -> None:
    with loaded_over(two[0]):
        pass
    assert two[0].calls == [
        "/pause_generation",
        "/flush_cache",
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/end_weight_update",
        "/update_weight_version",
        "/continue_generation",
    ]


def test_a_server_lost_during_an_update_does_not_fail_the_push(two: list[StandIn]) -> None:
    with loaded_over(*two) as engine:
        two[0].load = lambda weights: two[0].die()
        engine.load_shards(SHARDS, 2)
        assert last_tokens(engine, 10) == list(range(10))
        assert two[1].weight_version == "2"


def test_an_update_given_up_before_anything_was_written_serves_on(two: list[StandIn]) -> None:
    with loaded_over(*two, version=4) as engine:
        engine.begin_update()
        engine.abort_update(intact=True)
        assert engine.generate([[5, 6]], SHORT)[0][0].policy_version == 4
        with pytest.raises(ValueError, match="missing"):
            engine.load_shards({}, 5)
        assert engine.generate([[5, 6]], SHORT)[0][0].policy_version == 4


def test_a_half_written_update_refuses_until_a_whole_one(two: list[StandIn]) -> None:
    with loaded_over(*two, version=4) as engine:
        engine.begin_update()
        engine.write_shards(SHARDS)
        engine.abort_update(intact=False)
        with pytest.raises(RuntimeError, match="middle of a weight update"):
            engine.generate([[5, 6]], SHORT)
        engine.load_shards(SHARDS, 5)
        assert engine.generate([[5, 6]], SHORT)[0][0].policy_version == 5
