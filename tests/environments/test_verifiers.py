"""Environments made with the real `verifiers`, its own interception server and scoring included: `make test-peers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verifiers", reason="verifiers is in the environment of make test-peers")

from environments.playing import engine, play, prompts, tokenizer

from megatron_rl.config import ConfigError
from megatron_rl.environments import EnvironmentConfig, EpisodeError, Lost, Transcript, build_environment
from megatron_rl.rollout import SamplingParams
from megatron_rl.workers.episodes import Episodes

TURN = SamplingParams(max_tokens=60, n=2, stop_token_ids=tuple(range(60, 160)))


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the user's package, as if it were installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "verifiers_package"))


def block(**agent: Any) -> dict[str, Any]:
    return {"taskset": {"id": "even-sums"}, "agent": {"runtime": {"type": "subprocess"}, **agent}}


def episodes(env: dict[str, Any], **limits: Any) -> Episodes:
    section = {"name": "verifiers", "options": {"env": env}, "rewritten_history": "keep"}
    return Episodes(section, tokenizer(), **limits)


def test_the_rewards_are_those_of_the_environment_and_the_tokens_those_of_the_model() -> None:
    asked = prompts(5)  # of three tasks: the fourth is the first one again
    found = play(episodes(block()), asked, engine(), TURN)
    for prompt, group in zip(asked, found, strict=True):
        for transcript in group:
            number = prompt.index % 3
            assert isinstance(transcript, Transcript)
            assert transcript.messages[0]["content"] == f"what is {number}+{number}?"
            assert len(transcript.token_ids) == len(transcript.mask) == len(transcript.logprobs)
            if transcript.finish_reason == "stop":
                assert transcript.turns == 2
                assert transcript.reward == pytest.approx(2 + 2 * number / 100 + 0.5)
                observed = [t for t, bit in zip(transcript.token_ids, transcript.mask, strict=True) if not bit]
                wanted = "\n<|im_start|>user\nare you sure?<|im_end|>\n<|im_start|>assistant\n"
                assert tokenizer().decode(observed) == wanted
    assert any(transcript.finish_reason == "stop" for group in found for transcript in group)
    again = play(episodes(block()), asked, engine(), TURN)
    assert [[t.token_ids for t in group] for group in again] == [[t.token_ids for t in group] for group in found]


def test_a_limit_ends_the_episode_and_its_reward_is_none_of_the_environments() -> None:
    ((first, second),) = play(episodes(block(), max_turns=1), prompts(1), engine(), TURN)
    assert {first.finish_reason, second.finish_reason} <= {"turns", "length"}
    assert first.turns == second.turns == 1
    assert first.reward == second.reward == 0


def test_an_episode_that_fails_says_why() -> None:
    failing = block(harness={"id": "even-sums", "env": {"fail": "1"}})
    with pytest.raises(EpisodeError, match=r"verifiers: HarnessError: .*the harness is gone"):
        play(episodes(failing), prompts(1), engine(), TURN)
    ((first, _),) = play(episodes(failing, on_failure="drop"), prompts(1), engine(), TURN)
    assert isinstance(first, Lost)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"taskset": {"id": "nothing-there"}}, "'nothing-there' not found"),
        ({"taskset": {"id": "even-sums", "ids": 3}}, "ids"),
        ({}, "taskset"),
        ({"taskset": {"id": "even-sums"}, "id": "user-sim"}, "agents are the model in training"),
    ],
    ids=["package", "key", "empty", "two models"],
)
def test_mistakes_are_named_before_a_run(env: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_environment(EnvironmentConfig(name="verifiers", options={"env": env}))
