"""Agents written with the `openai` package, against the real endpoint over real sockets, on the real local engine."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from environments.playing import engine, play, prompts, tokenizer

from megatron_rl.batch import Prompt
from megatron_rl.environments import AgentEnvironment, EpisodeError, Lost, Transcript
from megatron_rl.environments.agent_session import for_agent
from megatron_rl.environments.tool_calls import parse_turn
from megatron_rl.rollout import LocalEngine, SamplingParams
from megatron_rl.workers.episodes import Episodes

openai = pytest.importorskip("openai", reason="agents are tested with the openai package: make setup installs it")

TURN = SamplingParams(max_tokens=60, n=2, stop_token_ids=tuple(range(60, 160)))
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def local() -> LocalEngine:
    return engine()


def agents(function: Any, **limits: Any) -> Episodes:
    return Episodes(lambda: AgentEnvironment(function), tokenizer(), rewritten_history="keep", **limits)


def flat(outcomes: list[list[Any]]) -> list[Any]:
    return [outcome for group in outcomes for outcome in group]


def three_turns(base_url: str, api_key: str, prompt: Prompt) -> float:
    client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages: list[Any] = [{"role": "user", "content": prompt.text}]
    for turn in range(3):
        answer = client.chat.completions.create(model="policy", messages=messages, tools=[TOOL], temperature=0.1)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        messages += [answer.choices[0].message, {"role": "user", "content": f"go on {turn}"}]
    return len(messages)


def test_an_agents_conversation_is_recorded_as_the_tokens_of_its_turns(local: LocalEngine) -> None:
    found = flat(play(agents(three_turns), prompts(4), local, TURN))
    for transcript in found:
        assert isinstance(transcript, Transcript)
        whole = [t for t in (transcript.mask, transcript.logprobs) if len(t) == len(transcript.token_ids)]
        assert len(whole) == 2
        observed = [token for token, bit in zip(transcript.token_ids, transcript.mask, strict=True) if not bit]
        if transcript.finish_reason == "stop":
            assert transcript.reward == 7
            assert transcript.turns == 3
            turn = "\n<|im_start|>user\ngo on {}<|im_end|>\n<|im_start|>assistant\n"
            assert tokenizer().decode(observed) == turn.format(0) + turn.format(1)
        given = tokenizer().apply_chat_template(
            transcript.messages[:1], tools=[TOOL], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer().decode(transcript.prompt_ids) == given
    assert any(transcript.finish_reason == "stop" for transcript in found)
    again = flat(play(agents(three_turns), prompts(4), local, TURN))
    assert [t.token_ids for t in again] == [t.token_ids for t in found]


def test_an_async_agent_may_stream_and_use_the_key_alone(local: LocalEngine) -> None:
    async def streaming(base_url: str, api_key: str, prompt: Prompt) -> float:
        root = base_url.split("/sessions/")[0] + "/v1"
        async with openai.AsyncOpenAI(base_url=root, api_key=api_key) as client:
            assert [model.id async for model in client.models.list()] == ["policy"]
            asked = [{"role": "user", "content": prompt.text}]
            chunks = await client.chat.completions.create(model="policy", messages=asked, stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])
        return len(text)

    for transcript in flat(play(agents(streaming), prompts(2), local, TURN)):
        assert transcript.reward == len(transcript.messages[-1]["content"])


def test_a_limit_ends_an_agents_episode_and_keeps_its_tokens(local: LocalEngine) -> None:
    found = flat(play(agents(three_turns, max_turns=2), prompts(4), local, TURN))
    assert {transcript.finish_reason for transcript in found} <= {"turns", "length"}
    assert any(transcript.finish_reason == "turns" and transcript.turns == 2 for transcript in found)
    assert all(transcript.mask[-1] == 1 for transcript in found)


def test_requests_that_do_not_continue_the_conversation_are_refused_with_the_reason(local: LocalEngine) -> None:
    said: list[str] = []

    def refused(base_url: str, api_key: str, prompt: Prompt) -> float:
        client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        first = [{"role": "user", "content": prompt.text}]
        answer = client.chat.completions.create(model="policy", messages=first).choices[0].message
        for messages, more in (
            ([{"role": "user", "content": "another"}, answer, *first], {}),
            ([*first, answer], {}),
            ([*first, answer, *first], {"n": 2}),
            ([], {}),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="policy", messages=messages, **more)
            said.append(str(caught.value))
        wrong = openai.OpenAI(base_url=base_url.replace(api_key, "nobody"), api_key="x", max_retries=0)
        with pytest.raises(openai.NotFoundError):
            wrong.chat.completions.create(model="policy", messages=first)
        return 1.0

    (transcript,) = flat(play(agents(refused), prompts(1), local, SamplingParams(**TURN.model_dump() | {"n": 1})))
    assert transcript.turns == 1
    for text, part in zip(
        said, ("message 0 differs", "do not continue", "n and stop", "no chat messages"), strict=True
    ):
        assert part in text


@pytest.mark.parametrize(
    ("agent", "reason"),
    [
        (lambda base_url, api_key, prompt: 1.0, "without asking"),
        (lambda base_url, api_key, prompt: 1 / 0, "the agent raised ZeroDivisionError"),
        (lambda base_url, api_key, prompt: time.sleep(30), "did not end in 1 s"),
    ],
    ids=["silent", "raising", "hanging"],
)
def test_an_agent_that_fails_costs_its_own_episode(local: LocalEngine, agent: Any, reason: str) -> None:
    def sometimes(base_url: str, api_key: str, prompt: Prompt) -> Any:
        return (agent if prompt.index == 0 else three_turns)(base_url, api_key, prompt)

    with pytest.raises(EpisodeError, match=f"prompt 0, sample [01], turn 0: .*{reason}"):
        play(agents(sometimes, seconds=1.0), prompts(1), local, TURN)
    if reason == "did not end in 1 s":  # how long the others take depends on the machine
        return
    lost, kept = play(agents(sometimes, on_failure="drop"), prompts(2), local, TURN)
    assert all(isinstance(outcome, Lost) for outcome in lost)
    assert all(isinstance(outcome, Transcript) for outcome in kept)


def test_calls_of_tools_come_as_openais_api_has_them() -> None:
    message = for_agent(parse_turn('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "hermes").message(1))
    parsed = openai.types.chat.ChatCompletionMessage.model_validate(message)
    assert parsed.tool_calls[0].function.name == "f"
    assert json.loads(parsed.tool_calls[0].function.arguments) == {"a": 1}


def test_forty_agents_at_once(local: LocalEngine) -> None:
    async def one_turn(base_url: str, api_key: str, prompt: Prompt) -> float:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
            await asyncio.sleep(prompt.index % 7 * 0.01)
            asked = [{"role": "user", "content": prompt.text}]
            await client.chat.completions.create(model="policy", messages=asked, timeout=120)
        return prompt.index

    outcomes = play(agents(one_turn, seconds=120.0), prompts(20), local, TURN)
    assert [[t.reward for t in group] for group in outcomes] == [[i, i] for i in range(20)]
    assert all(t.messages[0]["content"] == f"question {i}" for i, group in enumerate(outcomes) for t in group)
