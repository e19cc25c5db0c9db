"""`Episodes`: what `actor.sample(environment=...)` plays: conversations of one engine with one kind of environment.

The seed of a turn depends on the seed of its prompt, the sample and the turn, and on nothing else: neither the layout
nor the order in which episodes finish changes what is drawn.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.config import ConfigError
from megatron_rl.environments import (
    ENVIRONMENTS,
    Chat,
    Environment,
    EnvironmentConfig,
    EnvironmentFactory,
    EpisodeError,
    Lost,
    Model,
    Player,
    Transcript,
    build_environment,
    first_of,
)
from megatron_rl.rollout.base import (
    Ask,
    Completion,
    Conversation,
    RolloutEngine,
    SamplingParams,
    ServersLostError,
    sample_seed,
)

logger = logging.getLogger(__name__)

EnvironmentSource = EnvironmentConfig | Mapping[str, Any] | str | type[Environment] | Callable[[], Environment]

ENVIRONMENT_PART = -1  # in place of a turn's number, in the seed of the environment itself


@dataclass(frozen=True, slots=True)
class FailedEpisode:
    """In place of a transcript: an episode failed, and failures stop the run: on all ranks, by `Episodes.samples`."""

    reason: str


Outcome = Transcript | Lost | FailedEpisode


class Episodes:
    """Plays episodes on rollout engines.

    Args:
        source: a name or section of a configuration, a subclass of `Environment`, or a function that makes one.
        limits: fields of `EnvironmentConfig` that ``source`` does not name itself.

    Raises:
        ConfigError: there is no such environment, ``source`` makes something else, or the chat template cannot be used
            with it.
    """

    def __init__(self, source: EnvironmentSource, tokenizer: Any, **limits: Any) -> None:
        self.config, self.factory = environment_of(source, **limits)
        self.chat = Chat(tokenizer, self.config.template, self.config.rewritten_history == "keep")
        check_chat(self.chat, first_of(self.factory, self.config))
        self._counts: Counter[str] = Counter()
        self.last_lost = ""  # why the last lost episode failed

    def play(
        self,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int],
        **facts: Any,
    ) -> list[list[Outcome]]:
        """``params.n`` episodes of each prompt, on the engine's first rank; elsewhere an empty list.

        Args:
            facts: of `Model`: decode, stop_token_ids, context.
        """
        model = Model.of(self.chat, self.config, turn_tokens=params.max_tokens, **facts)
        player = Player(self.factory, self.config, model, asyncio.Semaphore(self.config.concurrency))
        failures: list[str] = []
        conversations = [
            self._conversation(player, prompt, seed, sample, failures)
            for prompt, seed in zip(prompts, seeds, strict=True)
            for sample in range(params.n)
        ]
        try:
            outcomes = engine.converse(conversations, params)
        except ServersLostError as error:
            found = {number: answers[0] for number, answers in error.answers.items()}
            groups = {i: [found.get(i * params.n + j) for j in range(params.n)] for i in range(len(prompts))}
            whole: Any = {i: group for i, group in groups.items() if None not in group}
            raise ServersLostError(str(error), whole) from error
        return [outcomes[start : start + params.n] for start in range(0, len(outcomes), params.n)]

    @staticmethod
    def _conversation(
        player: Player, prompt: Prompt, seed: int, sample: int, failures: list[str]
    ) -> Conversation[Outcome]:
        """Args:
        failures: why episodes of this call failed; after the first no other one gets an answer of the model.
        """

        async def converse(ask: Ask) -> Outcome:
            async def ask_unless_failed(token_ids: Sequence[int], max_tokens: int, seed: int) -> Completion:
                if failures:
                    raise EpisodeError("another episode failed")
                return await ask(token_ids, max_tokens, seed)

            own = sample_seed(seed, sample, ENVIRONMENT_PART)
            try:
                return await player.play(
                    prompt, sample, own, lambda turn: sample_seed(seed, sample, turn), ask_unless_failed
                )
            except EpisodeError as error:
                failures.append(str(error))
                return FailedEpisode(failures[0])

        return converse

    def samples(self, prompt: Prompt, outcomes: Sequence[Outcome], group: int) -> list[Sample]:
        """Of one prompt's episodes; lost ones are left out, and counted.

        Raises:
            EpisodeError: one failed, and failures stop the run.
        """
        if failed := next((outcome for outcome in outcomes if isinstance(outcome, FailedEpisode)), None):
            raise EpisodeError(failed.reason)
        kept = [outcome for outcome in outcomes if isinstance(outcome, Transcript)]
        for outcome in outcomes:
            if isinstance(outcome, Lost):
                self.last_lost = outcome.reason
        self._counts["episodes"] += len(outcomes)
        self._counts["dropped"] += len(outcomes) - len(kept)
        return [transcript.as_sample(prompt, group, self.config.weight) for transcript in kept]

    def take_metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Of the samples made since the last call, and how many were lost."""
        counts, self._counts = self._counts, Counter()
        if counts["dropped"]:
            lost = (counts["dropped"], counts["episodes"], self.last_lost)
            logger.warning("%d of %d episodes were lost and are left out, the last one: %s", *lost)
        metrics = {"environment/dropped_fraction": counts["dropped"] / max(1, counts["episodes"])}
        if not samples:
            return metrics
        generated = sum(sum(sample.mask) for sample in samples)
        tokens = sum(len(sample.response_ids) for sample in samples)
        metrics |= {
            "environment/turns_mean": sum(sample.metadata["turns"] for sample in samples) / len(samples),
            "environment/observation_fraction": 1 - generated / max(1, tokens),
            "environment/reward_mean": sum(sample.environment_reward or 0.0 for sample in samples) / len(samples),
        }
        for reason in ("turns", "seconds"):
            ended = sum(sample.finish_reason == reason for sample in samples)
            metrics[f"environment/ended_by_{reason}_fraction"] = ended / len(samples)
        return metrics


def take_rewards(batch: Batch, episodes: Episodes) -> None:
    """The environment's rewards as those of the batch, for flows without `RewardModel.score`."""
    for sample in batch.samples:
        sample.reward = sample.environment_reward
    batch.sequences["rewards"] = torch.tensor([sample.reward for sample in batch.samples], dtype=torch.float32)
    batch.metrics.update(episodes.take_metrics(batch.samples))


def environment_of(source: EnvironmentSource, **limits: Any) -> tuple[EnvironmentConfig, EnvironmentFactory]:
    """The configuration and the factory of what `Episodes` takes.

    Raises:
        ConfigError: there is no such environment, or its options are wrong.
    """
    if isinstance(source, str):
        source = {"name": source}
    if isinstance(source, Mapping):
        source = EnvironmentConfig.parse(dict(source) | limits, where="environment")
    if isinstance(source, EnvironmentConfig):
        return source, build_environment(source)
    if not callable(source):
        raise ConfigError(
            f"environment {source!r:.80} is none: expected one of {', '.join(ENVIRONMENTS)}, a subclass of "
            "Environment, a function that makes one, or a section with a name"
        )
    name = str(getattr(source, "__name__", type(source).__name__))
    return EnvironmentConfig.parse({"name": name} | limits, where="environment"), source


def check_chat(chat: Chat, environment: Environment) -> None:
    """Raises ConfigError where the chat template cannot be used for conversations with ``environment``."""
    for role in environment.roles:
        chat.check([role], [tool.schema for tool in environment.tools])
