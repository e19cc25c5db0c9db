"""`ServiceReward`: a reward that a server gives, batched and bounded; a missing reward is never taken for a number.

A protocol says three things: the path, the request for some samples (`request`), and the rewards in an answer (`read`).
Everything else is here: cache, batches, concurrency, and what happens to samples without an answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from megatron_rl.batch import Sample
from megatron_rl.config import masked
from megatron_rl.rewards.reward import NoReward, Reward, RewardError, describe
from megatron_rl.rewards.service.cache import AnswerCache, answer_key
from megatron_rl.rewards.service.service_client import (
    NoAnswerError,
    RejectedError,
    ServiceClient,
    TransientError,
    WrongServerError,
)
from megatron_rl.rewards.service.service_config import ServiceConfig, bearer_headers, check_ca_file
from megatron_rl.rewards.service.template import fill

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """The service's answer for one sample."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)  # named criteria, for logs


Outcome = Scored | NoReward


class ServiceReward(Reward):
    """Base of the rewards that are asked for over HTTP.

    Args:
        config: address and limits.
        name: label in logs, metrics and errors.

    Raises:
        ConfigError: the token's environment variable or the certificate file is absent.
    """

    Config: type[ServiceConfig] = ServiceConfig  # type: ignore[assignment]  # narrower than any record
    path: ClassVar[str]
    once_per_replica = True

    def __init__(self, config: ServiceConfig, name: str) -> None:
        self.config = config
        self.name = name
        bearer_headers(config, name)  # a missing token is reported now, not after the first rollout
        check_ca_file(config, name)
        self.cache = AnswerCache(config.cache_dir)
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._begun: list[tuple[list[Sample], Future[list[Outcome]]]] = []
        self._background: ThreadPoolExecutor | None = None

    @property
    def batch_size(self) -> int:
        """Samples in one request."""
        return self.config.batch_size

    @property
    def endpoint(self) -> str:
        """Path that requests go to."""
        return self.path

    def request(self, samples: Sequence[Sample]) -> Any:
        """The JSON body that asks for the rewards of ``samples``."""
        raise NotImplementedError

    def read(self, answer: Any, samples: Sequence[Sample]) -> list[Outcome]:
        """The rewards in an answer, in the order of ``samples``; `NoReward` where one of them has none.

        Raises:
            TransientError: the answer does not have this service's form; another attempt may succeed.
            RewardError: the configuration does not fit the service's answers.
        """
        raise NotImplementedError

    def text_of(self, sample: Sample) -> str:
        """What a classifier reads."""
        return str(fill(self.config.text, sample))

    def score(self, samples: Sequence[Sample]) -> list[float | NoReward]:
        """Rewards in order; `NoReward` where ``on_failure`` is drop and there was no answer.

        Raises:
            RewardError: there was no answer and ``on_failure`` is stop, or the configuration does not fit the service.
        """
        started = time.perf_counter()
        begun, self._begun = self._begun, []
        early = {
            id(sample): outcome for part, found in begun for sample, outcome in zip(part, found.result(), strict=True)
        }
        others = [sample for sample in samples if id(sample) not in early]
        late = iter(self._outcomes(others) if others else [])
        outcomes = [early[id(sample)] if id(sample) in early else next(late) for sample in samples]
        self._seconds += time.perf_counter() - started
        return self._settle(samples, outcomes)

    def begin(self, samples: Sequence[Sample]) -> None:
        """Ask in the background; `score` waits for the answers. One thread, so batches are answered in order."""
        if self._background is None:
            self._background = ThreadPoolExecutor(1, thread_name_prefix=f"reward-{self.name}")
        part = list(samples)
        self._begun.append((part, self._background.submit(self._outcomes, part)))

    def _outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        """From the cache, or else from the service."""
        first: dict[str, Sample] = {}  # identical questions are asked once
        keys = [self._key(sample) for sample in samples]
        for key, sample in zip(keys, samples, strict=True):
            first.setdefault(key, sample)
        known = {key: Scored(**answer) for key in first if (answer := self.cache.get(key)) is not None}
        open_keys = [key for key in first if key not in known]
        try:
            outcomes = _run(self._ask_all([first[key] for key in open_keys])) if open_keys else []
        except WrongServerError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from None
        answered = dict(zip(open_keys, outcomes, strict=True))
        self.cache.put(
            {
                key: {"value": found.value, "parts": dict(found.parts)}
                for key, found in answered.items()
                if isinstance(found, Scored)
            }
        )
        self._counts["cache_hits"] += sum(key in known for key in keys)
        return [(known | answered)[key] for key in keys]

    def _key(self, sample: Sample) -> str:
        """A digest of all that the reward depends on: the request, and how the answer is read."""
        reading = {name for name in type(self.config).model_fields if name not in ServiceConfig.model_fields}
        options = self.config.model_dump(mode="json", include=reading)
        return answer_key(type(self).__name__, self.config.url + self.endpoint, self.request([sample]), options)

    def take_metrics(self) -> dict[str, float]:
        counted = ("samples", "dropped", "requests", "retries", "cache_hits")
        metrics = {f"reward_service/{self.name}/{what}_count": float(self._counts[what]) for what in counted}
        metrics[f"time/reward_service.{self.name}_s"] = self._seconds
        self._counts.clear()
        self._seconds = 0.0
        return metrics

    def _settle(self, samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> list[float | NoReward]:
        """Count, keep the named parts, and stop or drop where an answer is missing."""
        failed = [(s, o) for s, o in zip(samples, outcomes, strict=True) if isinstance(o, NoReward)]
        self._counts["samples"] += len(samples)
        if failed:
            lost, first = failed[0]
            how_many = f"{len(failed)} of {len(samples)} samples"
            what = f"reward {self.name!r} is missing for {how_many}: {first.reason}"
            if self.config.on_failure == "stop":
                raise RewardError(f"{what}; sample: {describe(lost)}; on_failure: drop would go on without them")
            self._counts["dropped"] += len(failed)
            logger.warning("%s; they are dropped", what)
        for sample, outcome in zip(samples, outcomes, strict=True):
            if isinstance(outcome, Scored):
                sample.reward_parts |= {f"{self.name}/{part}": value for part, value in outcome.parts.items()}
        return [outcome.value if isinstance(outcome, Scored) else outcome for outcome in outcomes]

    async def _ask_all(self, samples: Sequence[Sample]) -> list[Outcome]:
        size = self.batch_size
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        async with ServiceClient(self.config, self.name, self._counts) as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask(client, batch)) for batch in batches]
        return [outcome for task in tasks for outcome in task.result()]

    async def _ask(self, client: ServiceClient, samples: Sequence[Sample]) -> list[Outcome]:
        """One request; one that is rejected is halved until the samples at fault are found."""
        try:
            return list(
                await client.ask(self.endpoint, self.request(samples), lambda answer: self._read(answer, samples))
            )
        except RejectedError as error:
            if len(samples) == 1:
                return [NoReward(str(error))]
            middle = len(samples) // 2
            return await self._ask(client, samples[:middle]) + await self._ask(client, samples[middle:])
        except NoAnswerError as error:
            return [NoReward(str(error))] * len(samples)

    def _read(self, answer: Any, samples: Sequence[Sample]) -> list[Outcome]:
        """What `read` finds, if the numbers are finite. An answer with no reward at all is worth another attempt."""
        try:
            outcomes = [_finite(outcome) for outcome in self.read(answer, samples)]
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError, AttributeError) as error:
            raise TransientError(
                f"{masked(self.config.url)}: no reward in the answer ({type(error).__name__}: {error!s:.100})"
            ) from None
        lost = [outcome.reason for outcome in outcomes if isinstance(outcome, NoReward)]
        if len(lost) == len(samples):
            raise TransientError(f"{masked(self.config.url)}: no reward in the answer: {lost[0]}")
        return outcomes


def _finite(outcome: Outcome) -> Outcome:
    numbers = (outcome.value, *outcome.parts.values()) if isinstance(outcome, Scored) else ()
    strange = [number for number in numbers if not math.isfinite(number)]
    return NoReward(f"it is {strange[0]}, expected a finite number") if strange else outcome


def _run(asked: Coroutine[Any, Any, T]) -> T:
    """Run to completion, also where this thread already has an event loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _unwrapped(asked)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_unwrapped, asked).result()


def _unwrapped(asked: Coroutine[Any, Any, T]) -> T:
    """The first error of a group of tasks instead of the group, so that callers see what they can name."""
    try:
        return asyncio.run(asked)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
