"""`RewardModel`: the stage that gives samples their rewards.

RewardModel(score_fn)                     a function of one `Sample`
RewardModel(MathReward())                 any `Reward`
RewardModel({"correct": r1, "format": (r2, 0.2)})   several, weighted
RewardModel("path/to/classifier")         a model with a value head, run by this job: see `model_reward`
RewardModel(model=chunks, tokenizer=tokenizer, parallel_state=parallel_state)      the same, of a Megatron job's own
RewardModel(url, kind="vllm", model="my-rm")        a service: see `megatron_rl.rewards.service`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.batch import Batch, Sample
from megatron_rl.config import ConfigError
from megatron_rl.dataflow import Stage
from megatron_rl.engines.engine_config import EngineConfig
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.rewards import NoReward, Reward, RewardError, as_reward, build_service, share
from megatron_rl.workers.job_context import running_context
from megatron_rl.workers.model_reward import ModelReward, is_model


class RewardModel:
    """Gives each sample its reward.

    Args:
        source: a function ``Sample -> float``, a `Reward`, or a mapping of names to rewards or (reward, weight) pairs;
            or with ``kind`` the address of a service; or a model with a value head: a Hugging Face sequence classifier
            with one label (folder, id or model), a Megatron checkpoint, Megatron chunks, a ready `TrainingEngine`. A
            model may also be given as ``model``.
        tokenizer, parallel_state, parallel, context, config: of a model with a value head, as for `Critic`.
        kind: vllm, sglang, tei, tgi, http or judge, when ``source`` is an address.
        options: of the service's Config, of `as_reward`, or of `ModelReward` (``retokenize``, ``pad_token_id``).

    Raises:
        ConfigError: ``source`` is none of these.
    """

    def __init__(
        self,
        source: Callable[[Sample], float] | Reward | Mapping[str, Any] | Any = None,
        tokenizer: Any = None,
        *,
        parallel_state: Any = None,
        parallel: ParallelSizes | None = None,
        context: ParallelContext | None = None,
        config: EngineConfig | Mapping[str, Any] | None = None,
        kind: str | None = None,
        **options: Any,
    ) -> None:
        of_model: dict[str, Any] = {
            "tokenizer": tokenizer,
            "parallel_state": parallel_state,
            "parallel": parallel,
            "context": context,
            "config": config,
        }
        if source is None:
            source = options.pop("model", None)
        if kind is not None or (isinstance(source, str) and source.startswith(("http://", "https://"))):
            self.reward: Reward = build_service(str(source), kind, **_only(options, of_model))
        elif source is not None and is_model(source):
            self.reward = ModelReward(model=source, engine_config=of_model.pop("config"), **of_model, **options)
        else:
            self.reward = as_reward(source, **_only(options, of_model))
        self._joined = False

    def score(self) -> Stage:
        """A stage that writes ``rewards`` fp32 ``[num_samples]`` and each sample's ``reward``; samples without
        a reward are dropped from the batch. What an environment gave is added. Metrics: ``rewards/dropped_fraction``,
        ``reward_parts/NAME/mean`` of each reward where there are several, and what services count.

        Raises:
            RewardError: when run, if a reward raises or is not a finite number (the message names the sample), or if
                no sample has a reward.
        """

        def run(batch: Batch) -> None:
            self._join_replica()
            rewards = self.reward.with_environment(batch.samples, self.reward(batch.samples))
            batch.metrics.update(self.reward.take_metrics())
            num_samples = len(batch.samples)
            batch.samples, numbers = _with_reward(self.reward.name, batch.samples, rewards)
            for sample, number in zip(batch.samples, numbers, strict=True):
                sample.reward = number
            batch.metrics["rewards/dropped_fraction"] = 1 - len(batch.samples) / max(1, num_samples)
            batch.metrics.update(_part_means(batch.samples))
            batch.sequences["rewards"] = torch.tensor(numbers, dtype=torch.float32)

        collective = self.reward.place != Reward.place
        place = self.reward.place
        return Stage(
            "reward.score", run, ("samples",), ("rewards",), place, collective=collective, generates=not collective
        )

    def begin(self, samples: list[Sample]) -> None:
        """Let services work on these samples while others are still generated: the ``then`` of `Actor.sample`.

        Call it on every rank; `score` waits for the answers.
        """
        self._join_replica()
        self.reward.begin(samples)

    def _join_replica(self) -> None:
        """Once, before the first rewards: a reward that one rank of each replica computes learns of the other ranks."""
        if not self._joined and dist.is_initialized() and dist.get_world_size() > 1:
            self.reward = share(self.reward, running_context(seed=0))
        self._joined = True


def _only(options: Mapping[str, Any], of_model: Mapping[str, Any]) -> Mapping[str, Any]:
    """``options``; arguments of a model are refused, as this reward runs none."""
    given = [name for name, value in of_model.items() if value is not None]
    if given:
        raise ConfigError(f"RewardModel: {', '.join(given)} belong to a model that this job runs: leave them out")
    return options


def _with_reward(name: str, samples: list[Sample], rewards: list[float | NoReward]) -> tuple[list[Sample], list[float]]:
    """The samples that have a reward, and their rewards."""
    pairs = [(s, r) for s, r in zip(samples, rewards, strict=True) if not isinstance(r, NoReward)]
    if samples and not pairs:
        reason = next(reward.reason for reward in rewards if isinstance(reward, NoReward))
        raise RewardError(f"reward {name!r} could not be computed for any of {len(samples)} samples: {reason}")
    return [sample for sample, _ in pairs], [reward for _, reward in pairs]


def _part_means(samples: list[Sample]) -> dict[str, float]:
    """Means of the named rewards, where there are several."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        for part, value in sample.reward_parts.items():
            values.setdefault(part, []).append(value)
    return {f"reward_parts/{part}/mean": sum(v) / len(v) for part, v in values.items()} if len(values) > 1 else {}
