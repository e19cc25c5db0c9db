"""Servers of reward models (sequence classifiers): vLLM, SGLang, and text-embeddings-inference.

Sources of the schemas: vLLM `vllm/entrypoints/pooling/{classify,pooling,scoring}/protocol.py`; SGLang 0.5
`srt/entrypoints/http_server.py:classify_request` (`EmbeddingReqInput` in `srt/managers/io_struct.py`);
text-embeddings-inference `docs/openapi.json` (PredictRequest).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

from pydantic import Field

from megatron_rl.batch import Sample
from megatron_rl.rewards.reward import REWARDS, NoReward, RewardError, describe
from megatron_rl.rewards.service.service_client import TransientError
from megatron_rl.rewards.service.service_config import ServiceConfig
from megatron_rl.rewards.service.service_reward import Outcome, Scored, ServiceReward


@REWARDS.register("vllm")
class VllmReward(ServiceReward):
    """A reward model served by vLLM (``vllm serve MODEL --runner pooling``)."""

    class Config(ServiceConfig):
        """Where vLLM listens and which of its endpoints is asked."""

        model: str
        """Name that the server gives the model (``--served-model-name``, by default its path)."""
        endpoint: Literal["classify", "pooling", "score"] = "classify"
        """classify: one number a class; pooling: what the pooler gives (per token: its last row); score: a model of
        pairs, asked for (prompt, response)."""
        raw: bool = True
        """Ask for logits: without it vLLM applies the model's activation, and a reward is squeezed into 0..1."""
        class_index: int | None = Field(default=None, ge=0)
        """Which number is the reward where a model gives several."""

    config: Config

    def __init__(self, config: Config, name: str = "vllm") -> None:
        super().__init__(config, name)

    @property
    def endpoint(self) -> str:
        return f"/{self.config.endpoint}"

    def request(self, samples: Sequence[Sample]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.config.model}
        if self.config.raw:
            body["use_activation"] = False
        if self.config.endpoint == "score":
            pairs = {"text_1": [s.prompt.text for s in samples], "text_2": [s.response_text for s in samples]}
            return body | pairs
        if self.config.endpoint == "pooling":
            body["encoding_format"] = "float"
        return body | {"input": [self.text_of(s) for s in samples]}

    def read(self, answer: Any, samples: Sequence[Sample]) -> list[Outcome]:
        rows = answer.get("data") if isinstance(answer, dict) else None
        by_index = {row.get("index"): row for row in rows if isinstance(row, dict)} if isinstance(rows, list) else {}
        if not isinstance(rows, list) or len(rows) != len(samples) or set(by_index) != set(range(len(samples))):
            raise TransientError(f"expected {len(samples)} numbered rows in data, the server sent {_brief(answer)}")
        key = {"classify": "probs", "pooling": "data", "score": "score"}[self.config.endpoint]
        return [
            pick_number(self.name, by_index[place].get(key), self.config.class_index, sample)
            for place, sample in enumerate(samples)
        ]


@REWARDS.register("sglang")
class SGLangReward(ServiceReward):
    """A reward model served by SGLang (``python -m sglang.launch_server --is-embedding``).

    Its own ``/classify`` gives logits. ``/v1/classify`` is not used: it applies softmax, which makes every reward of a
    model with one output 1.0.
    """

    class Config(ServiceConfig):
        """Where SGLang listens."""

        class_index: int | None = Field(default=None, ge=0)
        """Which number is the reward where a model gives several."""

    config: Config
    path = "/classify"

    def __init__(self, config: Config, name: str = "sglang") -> None:
        super().__init__(config, name)

    def request(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return {"text": [self.text_of(sample) for sample in samples]}

    def read(self, answer: Any, samples: Sequence[Sample]) -> list[Outcome]:
        rows = expect_rows(answer, samples)
        return [
            pick_number(self.name, _member(row, "embedding"), self.config.class_index, sample)
            for row, sample in zip(rows, samples, strict=True)
        ]


@REWARDS.register("tei")
@REWARDS.register("tgi")
class TextEmbeddingsReward(ServiceReward):
    """A reward model behind ``/predict`` of Hugging Face's text-embeddings-inference ("tgi" is the same)."""

    class Config(ServiceConfig):
        """Where the server listens."""

        raw: bool = True
        """Ask for raw scores instead of probabilities."""
        truncate: bool = False
        """Let the server cut texts that are too long; otherwise they have no reward."""
        label: str | None = None
        """Which class's score is the reward where a model gives several."""

    config: Config
    path = "/predict"

    def __init__(self, config: Config, name: str = "tei") -> None:
        super().__init__(config, name)

    def request(self, samples: Sequence[Sample]) -> dict[str, Any]:
        # A list of two plain strings would be taken for one pair of texts: each text is a list of its own.
        inputs = [[self.text_of(sample)] for sample in samples]
        return {"inputs": inputs, "raw_scores": self.config.raw, "truncate": self.config.truncate}

    def read(self, answer: Any, samples: Sequence[Sample]) -> list[Outcome]:
        rows = expect_rows(answer, samples)
        return [self._of_label(row, sample) for row, sample in zip(rows, samples, strict=True)]

    def _of_label(self, row: Any, sample: Sample) -> Outcome:
        classes = row if isinstance(row, list) else []
        scores = {found["label"]: found.get("score") for found in classes if isinstance(_member(found, "label"), str)}
        if not scores:
            return NoReward(f"expected a list of classes, the server sent {_brief(row)}")
        label = self.config.label
        if label is None and len(scores) == 1:
            label = next(iter(scores))
        if label not in scores:
            wanted = "one class" if self.config.label is None else f"a class {self.config.label!r}"
            raise RewardError(
                f"reward {self.name!r}: expected {wanted}, the server gave {sorted(map(str, scores))}: set label "
                f"to one of these; sample: {describe(sample)}"
            )
        return pick_number(self.name, scores[label], None, sample)


def expect_rows(answer: Any, samples: Sequence[Sample]) -> list[Any]:
    """The answer as a list with one entry a sample.

    Raises:
        TransientError: it is something else.
    """
    if not isinstance(answer, list) or len(answer) != len(samples):
        raise TransientError(f"expected a list of {len(samples)} results, the server sent {_brief(answer)}")
    return answer


def pick_number(name: str, found: Any, index: int | None, sample: Sample) -> Outcome:
    """The reward in what a server gives for one sample: a number, a list of numbers, or a list of these for each token,
    of which the last counts. `NoReward` where there are no numbers.

    Raises:
        RewardError: several numbers and no ``index``, or none at ``index``: the configuration does not fit the model.
    """
    while isinstance(found, list) and found and isinstance(found[-1], list):
        found = found[-1]
    numbers = found if isinstance(found, list) else [found]
    if not numbers or not all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers):
        return NoReward(f"expected numbers, the server sent {_brief(found)}")
    if index is None and len(numbers) > 1:
        raise RewardError(
            f"reward {name!r}: the model gives {len(numbers)} numbers: set class_index to the one that is the reward; "
            f"sample: {describe(sample)}"
        )
    if index is not None and index >= len(numbers):
        raise RewardError(
            f"reward {name!r}: class_index={index}, but the model gives {len(numbers)} numbers; {describe(sample)}"
        )
    try:
        return Scored(float(numbers[index or 0]))
    except OverflowError:
        return NoReward("expected a number, the server sent one of hundreds of digits")


def _member(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nesting, or a number, that is too long to show
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "…"
