"""`Transcript`: one episode as it is recorded: tokens, which of them were generated, and what else is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy

from megatron_rl.batch import Prompt, Sample
from megatron_rl.data.messages import Message


class Turn(Protocol):
    """One answer of an engine; its `Completion` is one."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Any
    policy_version: int
    policy_version_spans: list[tuple[int, int]]
    metadata: dict[str, Any]


@dataclass(slots=True)
class Transcript:
    """Everything after the prompt is in ``token_ids``; its other lists of tokens are as long."""

    prompt_ids: list[int]
    prompt_text: str
    messages: list[Message]  # all of the conversation; the model's have their text as it was generated
    token_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 1 = generated
    logprobs: list[float] = field(default_factory=list)  # 0.0 where it was not
    spans: list[tuple[int, int]] = field(default_factory=list)  # (version, tokens); observations as the turn before
    texts: list[tuple[str, list[tuple[int, str]]]] = field(default_factory=list)  # of each turn, as `Sample` has it
    policy_version: int = 0  # of the weights that generated the last token
    turns: int = 0
    reward: float = 0.0
    finish_reason: str = "stop"
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def all_ids(self) -> list[int]:
        return self.prompt_ids + self.token_ids

    def generated(self, turn: Turn, text: str, special_tokens: list[tuple[int, str]]) -> None:
        """Append an answer of the model."""
        self.turns += 1
        self.token_ids += turn.token_ids
        self.mask += [1] * len(turn.token_ids)
        self.logprobs += turn.logprobs
        self.texts.append((text, special_tokens))
        self.policy_version = turn.policy_version
        for version, count in turn.policy_version_spans or [(turn.policy_version, len(turn.token_ids))]:
            self._span(version, count)
        self._note(turn.metadata)

    def observed(self, token_ids: Sequence[int], messages: Sequence[Message]) -> None:
        """Append what the environment answered, as the chat template writes it."""
        self.token_ids += token_ids
        self.mask += [0] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)
        self._span(self.policy_version, len(token_ids))
        self.messages += messages

    def _span(self, version: int, count: int) -> None:
        if self.spans and self.spans[-1][0] == version:
            self.spans[-1] = (version, self.spans[-1][1] + count)
        else:
            self.spans.append((version, count))

    def _note(self, metadata: dict[str, Any]) -> None:
        """Each turn's routed experts begin with those of the tokens before it; what was seen first stays, since it is
        what the tokens were generated with."""
        routed, known = metadata.get("routed_experts"), self.metadata.get("routed_experts")
        self.metadata |= metadata
        if routed is not None and known is not None:
            self.metadata["routed_experts"] = numpy.concatenate([known, routed[len(known) :]])

    def as_sample(self, prompt: Prompt, group: int, weight: float) -> Sample:
        """The sample of this episode. Its text is that of the model's turns, a line break between them."""
        pieces: list[str] = []
        special: list[tuple[int, str]] = []
        offset = 0
        for text, found in self.texts:
            special += [(offset + place, token) for place, token in found]
            pieces.append(text)
            offset += len(text) + 1
        asked = Prompt(self.prompt_ids, self.prompt_text, prompt.answer, prompt.metadata, prompt.index, prompt.messages)
        return Sample(
            prompt=asked,
            response_ids=self.token_ids,
            rollout_logprobs=self.logprobs,
            response_text="\n".join(pieces),
            response_mask=self.mask,
            finish_reason=self.finish_reason,
            policy_version=self.policy_version,
            policy_version_spans=self.spans,
            group=group,
            environment_reward=weight * self.reward,
            metadata=self.metadata | {"messages": self.messages, "turns": self.turns},
            special_tokens=special,
        )
