"""Episodes on stand-ins of SGLang servers: each at its own pace, none lost with a server, the same as on one engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from environments.playing import engine, play, prompts, tokenizer
from rollout.rollout_models import layout_of
from rollout.sglang_stand_in import StandIn, of_engine

from megatron_rl.batch import Prompt
from megatron_rl.environments import Environment, EpisodeError, Step, Transcript
from megatron_rl.rollout import SamplingParams, SGLangEngine
from megatron_rl.workers.episodes import Episodes

SHARDS = {"model.norm.weight": torch.ones(32)}
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=tuple(range(60, 160)))


@pytest.fixture
def servers() -> Iterator[list[StandIn]]:
    made = [StandIn(of_engine(engine())) for _ in range(2)]
    yield made
    for server in made:
        server.die()


def over(servers: list[StandIn]) -> SGLangEngine:
    eos = tokenizer().eos_token_id
    made = SGLangEngine(
        engine().architecture,
        layout_of(SHARDS),
        dtype=torch.float32,
        eos_token_ids=[eos],
        urls=[server.url for server in servers],
        recovery_timeout=20.0,
        request_timeout=20.0,
    )
    made.load_shards(SHARDS, 1)
    return made


class ThreeTurns(Environment):
    def reset(self, prompt: Prompt) -> Any:
        self.turns = 0
        return prompt.text

    def step(self, message: Any) -> Any:
        self.turns += 1
        return Step(f"turn {self.turns}", 1.0, self.turns == 3)


def three_turns() -> Episodes:
    return Episodes(ThreeTurns, tokenizer(), rewritten_history="keep")


def test_servers_play_the_episodes_of_the_local_engine_also_when_one_dies(servers: list[StandIn]) -> None:
    wanted = [t.token_ids for (t,) in play(three_turns(), prompts(12), engine(), GREEDY)]
    servers[0].die_after = 7
    with over(servers) as engines:
        found = [group[0] for group in play(three_turns(), prompts(12), engines, GREEDY)]
    assert [t.token_ids for t in found] == wanted
    assert all(t.spans == [(1, len(t.token_ids))] for t in found)
    answered = sum(t.turns for t in found)
    assert len(servers[0].answered) <= 7
    assert len(servers[0].answered) + len(servers[1].answered) >= answered


def test_an_episode_does_not_wait_for_the_environments_of_others(servers: list[StandIn]) -> None:
    finished: list[tuple[int, float]] = []

    class SlowForOne(ThreeTurns):
        def reset(self, prompt: Prompt) -> Any:
            self.index = prompt.index
            return super().reset(prompt)

        def step(self, message: Any) -> Any:
            time.sleep(1.5 if self.index == 0 else 0)
            return super().step(message)

        def close(self) -> None:
            finished.append((self.index, time.monotonic()))

    with over(servers) as engines:
        started = time.monotonic()
        play(Episodes(SlowForOne, tokenizer(), rewritten_history="keep"), prompts(6), engines, GREEDY)
    assert [index for index, _ in finished][-1] == 0
    if dict(finished)[0] - started > 4:  # it had its three turns
        assert all(ended < dict(finished)[0] for index, ended in finished if index)


def test_a_failing_environment_aborts_what_the_others_ask(servers: list[StandIn]) -> None:
    class Failing(ThreeTurns):
        def step(self, message: Any) -> Any:
            raise OSError("gone")

    with over(servers) as engines:
        with pytest.raises(EpisodeError, match="OSError: gone"):
            play(Episodes(Failing, tokenizer(), rewritten_history="keep"), prompts(8), engines, GREEDY)
        assert isinstance(play(three_turns(), prompts(1), engines, GREEDY)[0][0], Transcript)
