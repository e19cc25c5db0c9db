"""A real SGLang server (CPU) as judge: chat completions, whose grades are read where there are any, never made up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from integration.environment import sglang_python
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl import RewardModel
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.rewards import NoReward, RewardError, build_service
from megatron_rl.rewards.service.judge import JudgeReward
from megatron_rl.rollout.sglang.server import ServerConfig, SGLangServer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
# The judge is a small storyteller: grades come only where the server holds it to their form.
GRADE = r"Score: ([0-9]|10)"
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "grade",
        "schema": {
            "type": "object",
            "properties": {"Score": {"type": "integer", "enum": list(range(11))}},
            "required": ["Score"],
        },
    },
}


@pytest.fixture(scope="module")
def server(seeded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    python, folder = sglang_python(), tmp_path_factory.mktemp("storyteller")
    AutoModelForCausalLM.from_pretrained(seeded_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(seeded_model)
    tokenizer.chat_template = PLAIN_CHAT
    tokenizer.save_pretrained(folder)
    config = ServerConfig(
        python=python,
        context_length=512,
        max_total_tokens=4096,
        args={"constrained-json-disable-any-whitespace": True},  # or a small model's JSON is white space without end
    )
    server = SGLangServer(folder, config, dtype="float32", max_running=8, device="cpu", load_weights=True, name="judge")
    try:
        yield server.start()
    finally:
        server.close()


def samples(*responses: str) -> list[Sample]:
    prompts = [Prompt([1], text="Tell a story.", index=i) for i in range(len(responses))]
    return [Sample(p, [2], [0.0], response_text=text) for p, text in zip(prompts, responses, strict=True)]


def judge(server: SGLangServer, **options: Any) -> JudgeReward:
    usual = {"model": "storyteller", "rubric": "It is kind.", "max_tokens": 24, "retries": 0}
    made = build_service(server.url, "judge", **(usual | options))
    assert isinstance(made, JudgeReward)
    return made


def verdict(server: SGLangServer, reward: JudgeReward, sample: Sample) -> str:
    """What the server says to the same question, asked by hand."""
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=reward.request([sample]), timeout=60)
    return answer.raise_for_status().json()["choices"][0]["message"]["content"]


RESPONSES = ("Lily gave her friend the ball.", "The dog bit Tim and ran away.", "Mom said no.", "")


@pytest.mark.parametrize("form", [{"regex": GRADE}, {"response_format": SCHEMA}], ids=["regex", "json schema"])
def test_the_reward_is_the_number_that_the_judge_said(server: SGLangServer, form: dict[str, Any]) -> None:
    batch = Batch(samples=samples(*RESPONSES))
    asked = judge(server, extra_body=form)
    said = [verdict(server, asked, sample) for sample in batch.samples]
    RewardModel(asked).score().run(batch)
    grades = [int(re.findall(r"\d+", text)[-1]) for text in said]
    assert batch.sequences["rewards"].tolist() == pytest.approx([grade / 10 for grade in grades])
    assert batch.metrics["reward_service/judge/requests_count"] == len(RESPONSES)
    assert batch.metrics["rewards/dropped_fraction"] == 0


def test_criteria_are_graded_apart_and_weighted(server: SGLangServer) -> None:
    criteria = {"kind": "Nobody is hurt.", "brief": "It is short."}
    form = {"regex": r"kind: [0-9]\nbrief: [0-9]"}
    asked = judge(server, rubric="", criteria=criteria, weights={"kind": 3.0}, extra_body=form)
    (sample,) = samples(RESPONSES[0])
    kind, brief = (int(grade) / 10 for grade in re.findall(r": (\d)", verdict(server, asked, sample)))
    (reward,) = asked([sample])
    assert reward == pytest.approx((3 * kind + brief) / 4)
    assert sample.reward_parts["judge/kind"] == pytest.approx(kind)
    assert sample.reward_parts["judge/brief"] == pytest.approx(brief)


def test_a_verdict_without_a_grade_is_no_reward_and_never_0(server: SGLangServer) -> None:
    asked = judge(server, on_failure="drop")
    said = verdict(server, asked, samples(RESPONSES[0])[0])
    assert len(said) > 5
    assert "Score:" not in said
    rewards = asked(samples(*RESPONSES))
    assert all(isinstance(reward, NoReward) and "no line 'Score: NUMBER'" in reward.reason for reward in rewards)
    assert asked.take_metrics()["reward_service/judge/dropped_count"] == len(RESPONSES)
    with pytest.raises(RewardError, match="no line 'Score: NUMBER'"):
        judge(server)(samples(RESPONSES[0]))


def test_a_grade_out_of_range_is_no_reward(server: SGLangServer) -> None:
    asked = judge(server, on_failure="drop", extra_body={"regex": r"Score: [1-9]{3}"})
    (reward,) = asked(samples(RESPONSES[0]))
    assert isinstance(reward, NoReward)
    assert "expected 0 to 10" in reward.reason


def test_a_response_too_long_for_the_judge_costs_only_itself(server: SGLangServer) -> None:
    batch = Batch(samples=samples(RESPONSES[0], "dog cat " * 400, RESPONSES[2]))
    kept = [batch.samples[0], batch.samples[2]]
    RewardModel(judge(server, on_failure="drop", extra_body={"regex": GRADE})).score().run(batch)
    assert batch.samples == kept
    assert batch.metrics["reward_service/judge/dropped_count"] == 1
