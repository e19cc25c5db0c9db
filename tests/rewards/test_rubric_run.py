"""A rubric in YAML and no code: `megatron-rl train` with a judge, as a user runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
from contract_server import ChatCompletion, ContractServer, chat
from forked import run_alone
from small_run import metrics_of, write_run

RUBRIC = """
rewards:
  - name: judge
    weight: 2.0
    label: style
    options:
      url: {url}
      model: my-judge
      criteria: {{correct: The sum is right., even: Its digits are even.}}
      weights: {{correct: 3.0}}
      extra_body: {{seed: 7}}
      token_env: JUDGE_TOKEN
      on_failure: drop
  - name: number
    label: exact
"""


def verdict(body: dict[str, Any]) -> dict[str, Any]:
    """Even digits are worth two grades each; who says nothing of the kind is not graded."""
    request = ChatCompletion.model_validate(body)
    assert request.seed == 7
    response = request.messages[-1].content.split("<response>")[1].split("</response>")[0].strip()
    grade = 2 * sum(c in "02468" for c in response)
    said = f"correct: 5\neven: {grade}" if response else "I have nothing to say."
    return chat(request) | {"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, dict[str, float]], ContractServer]:
    folder = tmp_path_factory.mktemp("rubric")
    server = ContractServer()
    server.token = "secret"
    server.plain["/v1/chat/completions"] = verdict
    rewards = yaml.safe_load(RUBRIC.format(url=server.url))
    config = write_run(folder, rollout_parts=2, trainer={"output_dir": str(folder / "out"), "num_steps": 2}, **rewards)
    try:
        run_alone("-m", "megatron_rl", "train", config, directory=folder, timeout=400, JUDGE_TOKEN="secret")
    finally:
        server.close()
    return metrics_of(folder / "out"), server


def test_each_criterion_is_logged_and_the_reward_is_their_weighted_sum(outcome) -> None:
    metrics, _ = outcome
    assert sorted(metrics) == [1, 2]
    for step in metrics.values():
        assert step["reward_parts/style/correct/mean"] == pytest.approx(0.5)
        assert 0.0 < step["reward_parts/style/even/mean"] < 1.0
        style = (3 * step["reward_parts/style/correct/mean"] + step["reward_parts/style/even/mean"]) / 4
        assert step["reward_parts/style/mean"] == pytest.approx(style)
        whole = 2 * step["reward_parts/style/mean"] + step["reward_parts/exact/mean"]
        assert step["rewards/mean"] == pytest.approx(whole, abs=1e-6)


def test_the_judge_is_asked_once_for_each_different_response_and_its_silence_drops_the_sample(outcome) -> None:
    metrics, server = outcome
    asked = sum(step["reward_service/style/requests_count"] for step in metrics.values())
    assert asked == len(server.bodies) > 8
    assert sum(step["reward_service/style/dropped_count"] for step in metrics.values()) > 0
    for step in metrics.values():
        assert step["reward_service/style/samples_count"] == 32
        assert step["rewards/dropped_fraction"] == step["reward_service/style/dropped_count"] / 32
