"""Episodes on the real local engine: exact tokens, limits, failures, and nothing lost or counted twice."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from environments.playing import engine, model, play, prompts, tokenizer

from megatron_rl.batch import Batch, Prompt
from megatron_rl.environments import Environment, EpisodeError, Lost, Step, Transcript
from megatron_rl.rollout import Completion, LocalEngine, SamplingParams
from megatron_rl.workers.episodes import Episodes

TURN = SamplingParams(max_tokens=60, n=2, stop_token_ids=tuple(range(60, 160)))  # short turns, of a random model


@pytest.fixture(scope="module")
def local() -> LocalEngine:
    return engine()


class Counting(Environment):
    """Answers with the number of the turn, and is done after ``turns``."""

    turns = 3

    def __init__(self) -> None:
        self.seen: list[str] = []

    def reset(self, prompt: Prompt) -> Any:
        return prompt.text

    def step(self, message: Any) -> Any:
        self.seen.append(message["content"])
        return Step(f"turn {len(self.seen)}", reward=0.5, done=len(self.seen) >= self.turns)


def counting(**limits: Any) -> Episodes:
    return Episodes(Counting, tokenizer(), rewritten_history="keep", **limits)


def flat(outcomes: list[list[Any]]) -> list[Any]:
    return [outcome for group in outcomes for outcome in group]


def test_an_episode_is_the_prompt_the_generated_tokens_and_the_observations(local: LocalEngine) -> None:
    whole = [t for t in flat(play(counting(), prompts(6), local, TURN)) if t.turns > 1]
    assert whole
    for transcript in whole:
        text = tokenizer().decode(transcript.all_ids)
        assert text.startswith("<|im_start|>user\nquestion ")
        observed = [place for place, bit in enumerate(transcript.mask) if not bit]
        expected = "".join(
            f"\n<|im_start|>user\nturn {i}<|im_end|>\n<|im_start|>assistant\n" for i in range(1, transcript.turns)
        )
        assert tokenizer().decode([transcript.token_ids[place] for place in observed]) == expected
        assert all(transcript.logprobs[place] == 0.0 for place in observed)
        assert transcript.spans == [(local.policy_version, len(transcript.token_ids))]
        assert transcript.reward == 0.5 * (transcript.turns - (transcript.finish_reason == "length"))


@torch.no_grad()
def test_log_probabilities_are_those_that_transformers_gives_the_whole_conversation(local: LocalEngine) -> None:
    for transcript in flat(play(counting(), prompts(4), local, TURN)):
        ids = torch.tensor([transcript.all_ids])
        logprobs = torch.log_softmax(model()(ids).logits[0], -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.tensor(transcript.mask, dtype=torch.bool)
        ours = torch.tensor(transcript.logprobs)
        torch.testing.assert_close(ours[mask], logprobs[-len(ours) :][mask], atol=1e-4, rtol=0)


def test_a_sample_trains_on_generated_tokens_only(local: LocalEngine) -> None:
    outcomes = play(counting(), prompts(3), local, TURN)
    samples = [t.as_sample(prompts(3)[i], i, 2.0) for i, group in enumerate(outcomes) for t in group]
    batch = Batch.from_samples(samples)
    generated = [m for t in flat(outcomes) for m in [0] * len(t.prompt_ids) + t.mask]
    assert batch["response_mask"].tolist() == [bool(m) for m in generated]
    assert batch["input_ids"].tolist() == [token for t in flat(outcomes) for token in t.all_ids]
    assert [s.environment_reward for s in samples] == [2 * t.reward for t in flat(outcomes)]
    for sample, transcript in zip(samples, flat(outcomes), strict=True):
        assert sample.response_text.count("turn 1") == 0
        assert len(sample.metadata["messages"]) == 2 * transcript.turns


def test_what_is_drawn_depends_neither_on_time_nor_on_company(local: LocalEngine) -> None:
    class Dawdling(Counting):
        def step(self, message: Any) -> Any:
            time.sleep(random.random() * 0.02)
            return super().step(message)

    ours = flat(play(counting(), prompts(5), local, TURN))
    slowly = flat(play(Episodes(Dawdling, tokenizer(), rewritten_history="keep"), prompts(5), local, TURN))
    alone = [t for one in prompts(5) for t in flat(play(counting(), [one], engine(max_running=1), TURN))]
    assert [t.token_ids for t in ours] == [t.token_ids for t in slowly] == [t.token_ids for t in alone]
    assert len({tuple(t.token_ids) for t in ours}) == 10


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"max_turns": 2}, "turns"), ({"max_tokens": 60}, "length"), ({"seconds": 1e-9}, "seconds")],
    ids=["turns", "tokens", "seconds"],
)
def test_a_limit_ends_an_episode_with_its_own_reason_and_no_observation(
    local: LocalEngine, limits: dict[str, Any], reason: str
) -> None:
    found = flat(play(counting(**limits), prompts(8), local, TURN))
    ended = [t for t in found if t.finish_reason == reason]
    assert ended
    for transcript in ended:
        assert transcript.mask[-1] == 1
        assert transcript.turns <= limits.get("max_turns", 3)
        assert len(transcript.token_ids) <= limits.get("max_tokens", 1000)
        assert transcript.turns == 1 or reason != "seconds"
        assert transcript.as_sample(prompts(1)[0], 0, 1.0).truncated


def test_the_models_context_ends_an_episode(local: LocalEngine) -> None:
    found = flat(play(counting(), prompts(4), local, TURN, context=90))
    assert all(len(t.all_ids) <= 90 for t in found)
    assert any(t.finish_reason == "length" and t.turns > 1 for t in found)
    with pytest.raises(EpisodeError, match=r"prompt 0, sample 0, turn 0: .* begins with \d+ tokens"):
        play(counting(), prompts(1), local, TURN, context=20)


def test_two_hundred_episodes_with_delays_and_failures_are_none_lost_and_none_counted_twice(local: LocalEngine) -> None:
    made: Counter[str] = Counter()
    lock = threading.Lock()

    class Unreliable(Environment):
        def reset(self, prompt: Prompt) -> Any:
            self.index, self.draw = prompt.index, random.Random(self.seed)
            with lock:
                made[f"reset {prompt.index}"] += 1
            return prompt.text

        def step(self, message: Any) -> Any:
            time.sleep(self.draw.random() * 0.01)
            kind = self.index % 10
            if kind == 1:
                raise OSError("the disk is gone")
            if kind == 2:
                time.sleep(60)
            if kind == 3:
                return "no step"
            return f"observation for {self.index}", 1.0, self.draw.random() < 0.4

        async def close(self) -> None:
            await asyncio.sleep(0)
            made["closed"] += 1

    limits = {"on_failure": "drop", "step_seconds": 2.0, "max_turns": 4, "concurrency": 300}
    episodes = Episodes(Unreliable, tokenizer(), rewritten_history="keep", **limits)
    asked = prompts(100)
    outcomes = play(episodes, asked, local, SamplingParams(**TURN.model_dump() | {"max_tokens": 200}))
    assert [len(group) for group in outcomes] == [2] * 100
    assert made.pop("closed") == 200
    assert set(made.values()) == {2}
    assert len(made) == 100
    for index, outcome in [(i, one) for i, group in enumerate(outcomes) for one in group]:
        if index % 10 in (1, 2, 3):
            assert isinstance(outcome, Lost)
            assert outcome.reason.startswith(f"prompt {index}, sample ")
        else:
            assert isinstance(outcome, Transcript)
            assert outcome.messages[0]["content"] == f"question {index}"
            texts = {m["content"] for m in outcome.messages[2::2]}
            assert texts <= {f"observation for {index}"}
    assert sum(isinstance(one, Lost) for one in flat(outcomes)) == 60
    samples = [s for i, group in enumerate(outcomes) for s in episodes.samples(asked[i], group, i)]
    assert len(samples) == 140
    assert episodes.take_metrics(samples)["environment/dropped_fraction"] == 0.3


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError("no disk"), r"prompt \d, sample \d, turn 1: environment 'Failing', step: OSError: no disk"),
        (StopIteration("over"), "step: RuntimeError: StopIteration: over"),
        (KeyboardInterrupt("user"), "step: RuntimeError: KeyboardInterrupt: user"),
    ],
)
def test_a_failure_is_named_and_stops_where_that_is_wanted(
    local: LocalEngine, failure: BaseException, expected: str
) -> None:
    class Failing(Counting):
        def step(self, message: Any) -> Any:
            raise failure

    with pytest.raises(EpisodeError, match=expected):
        play(Episodes(Failing, tokenizer(), rewritten_history="keep"), prompts(3), local, TURN)
    assert play(counting(), prompts(1), local, TURN)  # the engine goes on


def test_a_failed_episode_is_begun_anew_with_the_same_draws(local: LocalEngine) -> None:
    failures: Counter[str] = Counter()

    class OnceFailing(Counting):
        def step(self, message: Any) -> Any:
            failures[message["content"]] += 1
            if failures[message["content"]] == 1:
                raise OSError("for once")
            return super().step(message)

    wanted = [t.token_ids for t in flat(play(counting(), prompts(3), local, TURN))]
    patient = Episodes(OnceFailing, tokenizer(), rewritten_history="keep", retries=9)
    assert [t.token_ids for t in flat(play(patient, prompts(3), local, TURN))] == wanted


def test_environments_may_be_async(local: LocalEngine) -> None:
    class Asynchronous(Counting):
        async def reset(self, prompt: Prompt) -> Any:
            await asyncio.sleep(0.001)
            return [{"role": "system", "content": "be brief"}, {"role": "user", "content": prompt.text}]

        async def step(self, message: Any) -> Any:
            await asyncio.sleep(0.001)
            return Counting.step(self, message)

    found = flat(play(Episodes(Asynchronous, tokenizer(), rewritten_history="keep"), prompts(2), local, TURN))
    assert all(tokenizer().decode(t.prompt_ids).startswith("<|im_start|>system\nbe brief") for t in found)


def test_routed_experts_of_earlier_turns_stay_as_they_were_generated_with() -> None:
    def turn(rows: int, expert: int) -> Completion:
        return Completion([1, 2], [-1.0, -1.0], "stop", 0, metadata={"routed_experts": np.full((rows, 2, 1), expert)})

    transcript = Transcript([5, 6, 7], "", [])
    transcript.generated(turn(4, 3), "", [])  # three tokens of the prompt, and all but the last generated
    transcript.observed([8, 9], [])
    transcript.generated(turn(8, 6), "", [])
    routed = transcript.metadata["routed_experts"]
    assert routed[:, 0, 0].tolist() == [3] * 4 + [6] * 4
    assert len(routed) == len(transcript.all_ids) - 1
