"""Services score one part of a step's samples while the next is generated; the rewards are the same as without."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from contract_server import ContractServer, Handler, true_reward

from megatron_rl import Actor, RewardModel
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.rewards import RewardError, WeightedReward, build_service

ANSWER_SECONDS = 0.3
SECONDS = 60.0  # after which a wait has failed


@pytest.fixture
def server() -> Iterator[ContractServer]:
    server = ContractServer()

    def slowly(handler: Handler, number: int) -> bool:
        time.sleep(ANSWER_SECONDS)
        return False

    server.fault = slowly
    yield server
    server.close()


def samples(count: int) -> list[Sample]:
    return [Sample(Prompt([1], text="q", index=i), [2], [0.0], response_text="a" * i) for i in range(count)]


def expected(batch: list[Sample]) -> list[float]:
    return [true_reward(s.prompt.text + s.response_text) for s in batch]


def test_what_was_begun_is_answered_in_the_background_and_asked_for_once(server: ContractServer) -> None:
    service = build_service(server.url + "/sglang", "sglang")
    reward = WeightedReward({"service": (service, 2.0)})
    batch = samples(9)
    started = time.monotonic()
    reward.begin(batch[:3])
    reward.begin(batch[3:6])
    assert time.monotonic() - started < ANSWER_SECONDS  # nothing was waited for
    assert reward(batch[::-1]) == pytest.approx([2 * value for value in expected(batch)[::-1]])
    assert sorted(len(body["text"]) for body in server.bodies) == [3, 3, 3]
    assert service.take_metrics()["reward_service/service/samples_count"] == 9
    assert reward(batch[:2]) == pytest.approx([2 * value for value in expected(batch)[:2]])  # nothing is left over


def test_a_failure_in_the_background_is_raised_where_the_rewards_are_needed(server: ContractServer) -> None:
    service = build_service(server.url + "/nowhere", "sglang", retries=0)
    service.begin(samples(2))
    with pytest.raises(RewardError, match="status 404"):
        service(samples(2))


def test_an_actor_s_parts_keep_prompts_groups_and_rewards_together(server: ContractServer, seeded_model: Path) -> None:
    tokenizer = load_tokenizer(seeded_model)
    actor = Actor(seeded_model, tokenizer)
    texts = [f"Once upon a time, there was a girl named {name}." for name in ("Lily", "Sue", "Amy", "Kate", "Jane")]
    prompts = [Prompt(tokenizer(text).input_ids, text, index=i) for i, text in enumerate(texts)]
    begun: list[int] = []
    reward = RewardModel(server.url + "/sglang", kind="sglang")

    def then(made: list[Sample]) -> None:
        begun.append(len(made))
        reward.begin(made)

    batch = Batch(prompts=prompts)
    (actor.sample(n=3, max_tokens=8, parts=2, then=then) >> reward.score())(batch)
    assert begun == [9, 6]
    assert [sample.group for sample in batch.samples] == [i for i in range(5) for _ in range(3)]
    assert [sample.prompt.index for sample in batch.samples] == [i for i in range(5) for _ in range(3)]
    assert batch.sequences["rewards"].tolist() == pytest.approx(expected(batch.samples))
    actor.close()


def test_the_first_part_is_asked_for_and_answered_while_the_engine_works_on_the_second(
    server: ContractServer, seeded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No clock: the service answers only when the second part is being generated, and that ends only when it has."""
    asked, generating, answered = threading.Event(), threading.Event(), threading.Event()
    calls: list[int] = []

    def in_between(handler: Handler, number: int) -> bool:
        asked.set()
        assert generating.wait(SECONDS)
        handler.answer(server.bodies[number - 1])
        answered.set()
        return True

    server.fault = in_between
    tokenizer = load_tokenizer(seeded_model)
    actor = Actor(seeded_model, tokenizer)
    generate = actor.rollouts.engine.generate

    def watched(prompts: list[list[int]], *arguments: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 1:
            return generate(prompts, *arguments)
        assert asked.wait(SECONDS), "the first part was not asked for before the second was generated"
        generating.set()
        made = generate(prompts, *arguments)
        assert answered.wait(SECONDS), "the first part was not answered while the second was generated"
        return made

    monkeypatch.setattr(actor.rollouts.engine, "generate", watched)
    reward = RewardModel(server.url + "/sglang", kind="sglang", retries=0, timeout=SECONDS)
    text = "Once upon a time, there was a girl named Lily."
    batch = Batch(prompts=[Prompt(tokenizer(text).input_ids, text, index=i) for i in range(4)])
    (actor.sample(n=2, max_tokens=6, parts=2, then=reward.begin) >> reward.score())(batch)
    assert calls == [2, 2]
    assert batch.sequences["rewards"].tolist() == pytest.approx(expected(batch.samples))
    actor.close()
