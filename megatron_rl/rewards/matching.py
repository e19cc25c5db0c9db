"""Rule-based rewards that compare the response with the prompt's answer as text, as a number, or by a pattern."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from megatron_rl.batch import Sample
from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.config.ranges import NonNegative
from megatron_rl.rewards.answers import all_numbers, last_number
from megatron_rl.rewards.reward import REWARDS, Reward, RewardError, describe
from megatron_rl.rewards.special import TokenNames
from megatron_rl.rewards.truth import answer_of, required_truth


class ComparedReward(Reward):
    """A reward that compares the response with the prompt's answer."""

    def check_answer(self, answer: Any) -> None:
        required_truth(self.name, answer)


@REWARDS.register("exact")
class ExactReward(ComparedReward):
    """1 when the response, stripped, is the answer, else 0."""

    class Config(ConfigRecord):
        """How texts are compared."""

        ignore_case: bool = False
        """Compare without regard to case."""

    def __init__(self, config: Config | None = None, name: str = "exact") -> None:
        self.config = config or self.Config()
        self.name = name

    def score_one(self, sample: Sample) -> float:
        response, answer = sample.response_text.strip(), answer_of(self.name, sample)
        if self.config.ignore_case:
            response, answer = response.casefold(), answer.casefold()
        return float(response == answer)


@REWARDS.register("number")
class NumberReward(ComparedReward):
    """1 when the response's last (or first) number equals the answer's last number, else 0."""

    class Config(ConfigRecord):
        """Which numbers are compared, and how closely."""

        which: Literal["last", "first"] = "last"
        """The number of the response that counts."""
        tolerance: NonNegative = 0.0
        """Greatest absolute difference that still counts as equal."""

    def __init__(self, config: Config | None = None, name: str = "number") -> None:
        self.config = config or self.Config()
        self.name = name

    def check_answer(self, answer: Any) -> None:
        self._number(required_truth(self.name, answer), answer)

    def _number(self, truth: str, answer: Any) -> Fraction:
        number = last_number(truth)
        if number is None:
            raise ValueError(f"reward {self.name!r} compares numbers, and the answer {answer!r} holds none")
        return number

    def score_one(self, sample: Sample) -> float:
        try:
            answer = self._number(answer_of(self.name, sample), sample.prompt.answer)
        except ValueError as error:
            raise RewardError(f"{error}; sample: {describe(sample)}") from None
        numbers = all_numbers(sample.response_text)
        if not numbers:
            return 0.0
        given = numbers[-1] if self.config.which == "last" else numbers[0]
        return float(abs(given - answer) <= self.config.tolerance)


@REWARDS.register("regex")
class RegexReward(Reward):
    """1 when the pattern is found in the response; with ``compare``, when its first group is also the answer.

    Special tokens that the pattern names (``</think>``) are seen, others are not.
    """

    class Config(ConfigRecord):
        """The pattern."""

        pattern: str
        """Python regular expression; (?s), (?i) and the like set flags."""
        compare: bool = False
        """The first group of the last match must equal the answer, both stripped."""
        whole: bool = False
        """The pattern must match the whole response, stripped."""

    def __init__(self, config: Config, name: str = "regex") -> None:
        self.config = config
        self.name = name
        try:
            self.pattern = re.compile(config.pattern)
        except re.error as error:
            raise ConfigError(f"reward {name!r}: {config.pattern!r} is not a regular expression: {error}") from None
        if config.compare and self.pattern.groups == 0:
            raise ConfigError(
                f"reward {name!r}: compare needs a group, e.g. '= (\\d+)', and {config.pattern!r} has none"
            )

    @cached_property
    def named_tokens(self) -> TokenNames:
        """The special tokens that the pattern names: the response is searched with these in it."""
        return TokenNames(self.pattern)

    def check_answer(self, answer: Any) -> None:
        if self.config.compare:
            required_truth(self.name, answer)

    def score_one(self, sample: Sample) -> float:
        text = sample.text_with(self.named_tokens).strip()
        whole = self.pattern.fullmatch(text)
        matches = ([whole] if whole else []) if self.config.whole else list(self.pattern.finditer(text))
        if not matches or not self.config.compare:
            return float(bool(matches))
        return float((matches[-1].group(1) or "").strip() == answer_of(self.name, sample))
