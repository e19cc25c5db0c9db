"""`Prompt` and `Sample`: one question, and one answer to it with everything known about that answer.

Who fills each field is said beside it; `None` or an empty list means "not yet".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Prompt:
    """One question to the actor."""

    token_ids: list[int]  # data: the tokenised prompt, chat template applied
    text: str = ""  # data: the same as text, for rewards and logs
    answer: Any = None  # data: ground truth for rule-based rewards, in whatever form the reward expects
    metadata: dict[str, Any] = field(default_factory=dict)  # data: every other column of the record
    index: int = 0  # data: position in the data set; seeds this prompt's sampling and names it in errors
    messages: list[dict[str, Any]] | None = None  # data: the chat that `text` renders; None where it is plain text


@dataclass(slots=True)
class Sample:
    """One response to one prompt."""

    prompt: Prompt  # actor.sample
    response_ids: list[int]  # actor.sample: generated token ids, the stop token included where one was produced
    rollout_logprobs: list[float]  # actor.sample: log-probability of each response token under the rollout engine
    response_text: str = ""  # actor.sample: decoded response without special tokens
    response_mask: list[int] = field(default_factory=list)  # actor.sample: 1 = train on it; empty means all ones
    finish_reason: str = "stop"  # actor.sample: "stop" | "length" | "abort"; of an episode "turns" | "seconds" as well
    policy_version: int = 0  # actor.sample: version of the weights that generated it
    policy_version_spans: list[tuple[int, int]] = field(default_factory=list)  # engine: (version, token count) runs
    group: int = 0  # actor.sample: samples with the same group answer the same prompt of this batch
    reward: float | None = None  # reward.score: the scalar that training uses
    reward_parts: dict[str, float] = field(default_factory=dict)  # reward.score: each named reward before weighting
    metadata: dict[str, Any] = field(default_factory=dict)  # engines and rewards: anything worth keeping
    special_tokens: list[tuple[int, str]] = field(
        default_factory=list
    )  # actor.sample: (offset, text) left out of the text
    environment_reward: float | None = None  # actor.sample with an environment: what that gave, weighted

    def text_with(self, names: Callable[[str], bool]) -> str:
        """`response_text` with those special tokens in their places whose text ``names`` accepts; never EOS or padding,
        which `special_tokens` does not hold."""
        pieces, done = [], 0
        for offset, token in self.special_tokens:
            if names(token):
                pieces += [self.response_text[done:offset], token]
                done = offset
        return "".join([*pieces, self.response_text[done:]])

    @property
    def truncated(self) -> bool:
        """A limit ended it: on tokens, turns or seconds."""
        return self.finish_reason in ("length", "turns", "seconds")

    @property
    def mask(self) -> list[int]:
        """Training mask over the response tokens, ``[len(response_ids)]`` of 0/1."""
        return self.response_mask or [1] * len(self.response_ids)
