"""`HttpReward`: any JSON service, described by a template of the request and the path of the number in the answer.

rewards:
  - name: http
    options:
      url: https://scores.example/v2/rate          # the whole address
      request: {question: "{prompt}", reply: "{response}", gold: "{answer}"}
      path: result.score
  # or many samples in one request:
      request: {items: "{texts}"}
      path: "scores[*].value"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from megatron_rl.batch import Sample
from megatron_rl.rewards.reward import REWARDS
from megatron_rl.rewards.service.classifiers import expect_rows, pick_number
from megatron_rl.rewards.service.service_client import TransientError
from megatron_rl.rewards.service.service_config import ServiceConfig
from megatron_rl.rewards.service.service_reward import Outcome, ServiceReward
from megatron_rl.rewards.service.template import fill, fill_lists, look_up, takes_lists


@REWARDS.register("http")
class HttpReward(ServiceReward):
    """A number from any HTTP service that takes and gives JSON."""

    class Config(ServiceConfig):
        """The request and where its answer holds the number."""

        request: dict[str, Any] = Field(default_factory=lambda: {"prompt": "{prompt}", "response": "{response}"})
        """JSON body; {prompt}, {response}, {answer} and {text} are filled in. A value that is exactly {prompts},
        {responses}, {answers} or {texts} becomes a list, and one request then asks for up to batch_size samples."""
        path: str = "score"
        """Where the number stands: score, data.0.score, or with lists scores[*] or data[*].score."""

    config: Config
    path = ""

    def __init__(self, config: Config, name: str = "http") -> None:
        super().__init__(config, name)
        self.takes_lists = takes_lists(config.request)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size if self.takes_lists else 1

    def request(self, samples: Sequence[Sample]) -> Any:
        texts = [self.text_of(sample) for sample in samples]
        if self.takes_lists:
            return fill_lists(self.config.request, samples, texts)
        return fill(self.config.request, samples[0], texts[0])

    def read(self, answer: Any, samples: Sequence[Sample]) -> list[Outcome]:
        try:
            found = look_up(answer, self.config.path)
        except LookupError as error:
            raise TransientError(f"path {self.config.path!r} does not exist in the answer: {error}") from None
        rows = expect_rows(found, samples) if self.takes_lists else [found]
        return [pick_number(self.name, row, None, sample) for row, sample in zip(rows, samples, strict=True)]
