"""Evaluation, averaged over all data-parallel ranks: on held-out prompts the mean reward of the actor's answers, and
on held-out rows of offline training (DPO, KTO, SFT, reward models) the algorithm's loss and metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.algorithms import OfflineAlgorithm
from megatron_rl.batch import Batch, Prompt
from megatron_rl.data import DataError
from megatron_rl.parallel import ParallelContext
from megatron_rl.parallel.abandon import Abandoned, abandonable
from megatron_rl.rewards import NoReward, Reward, RewardError, share
from megatron_rl.trainer.metrics import reduce_metrics
from megatron_rl.workers import Actor
from megatron_rl.workers.episodes import EnvironmentSource, Episodes


class Evaluation:
    """Mean rewards of the actor's answers to fixed prompts.

    Args:
        prompts: all of them, on every rank.
        n, temperature: as in `EvaluationConfig`.
        environment: as for `Actor.sample`; what it gives is added to ``reward``.
        sampling: other fields of `SamplingParams`, over those of the actor's config.

    Raises:
        DataError: a prompt that the actor cannot answer: token ids, or length.
    """

    def __init__(
        self,
        actor: Actor,
        prompts: Sequence[Prompt],
        reward: Reward,
        n: int = 1,
        temperature: float = 0.0,
        environment: Episodes | EnvironmentSource | None = None,
        **sampling: Any,
    ) -> None:
        context = actor.context
        limits = actor.rollouts.limits(sampling.get("max_tokens", actor.config.sampling.max_tokens))
        for prompt in prompts:
            limits.check([prompt.token_ids], f"evaluation prompt {prompt.index}")
        self.actor = actor
        self.prompts = list(prompts[context.coordinates.dp :: context.grid.dp])
        self.reward = share(reward, context)
        self.n = n
        self.temperature = temperature
        self.environment = actor.episodes(environment)
        self.sampling = sampling

    def __call__(self) -> dict[str, float]:
        """``eval/reward``, ``eval/num_prompts``, ``eval/response_tokens_mean``, ``eval/dropped_fraction``, each part of
        the reward and what rewards count; the same on all ranks. Collective.

        Raises:
            RewardError: a reward failed, or none could be had. Samples without one are left out of the means.
            Abandoned: a signal asked the run to stop, and the time for this step is over.
        """
        context = self.actor.context
        gave_up: Abandoned | None = None
        try:
            samples = self.actor.generate(
                self.prompts, self.environment, n=self.n, temperature=self.temperature, **self.sampling
            )
        except Abandoned as abandoned:
            gave_up = abandoned
        with context.attempt("evaluation"):
            if gave_up is not None:
                raise gave_up
            with abandonable(self.reward.place == Reward.place):
                rewards = self.reward.with_environment(samples, self.reward(samples))
        counted = self.reward.take_metrics()  # evaluation's own: the next training step starts at 0 again
        if self.environment is not None:
            counted |= self.environment.take_metrics(samples)
        rewarded = [(s, r) for s, r in zip(samples, rewards, strict=True) if not isinstance(r, NoReward)]
        sums: dict[str, float] = {"reward": sum(reward for _, reward in rewarded), "response_tokens_mean": 0.0}
        for sample, _ in rewarded:
            sums["response_tokens_mean"] += len(sample.response_ids)
            for part, value in sample.reward_parts.items():
                sums[part] = sums.get(part, 0.0) + value
        # Every rank of a model replica has the same samples: one of them reports.
        own = (sums, len(rewarded), len(samples), counted) if context.leads_replica else ({}, 0, 0, {})
        reports = context.gather_objects(own)
        count, asked = sum(report[1] for report in reports), sum(report[2] for report in reports)
        if count == 0:
            raise RewardError(f"evaluation: reward {self.reward.name!r} could not be computed for any sample")
        names = {name for report in reports for name in report[0]}
        means = {name: sum(report[0].get(name, 0.0) for report in reports) / count for name in sorted(names)}
        means |= {"num_prompts": asked / self.n, "dropped_fraction": 1 - count / asked}
        means |= reduce_metrics([report[3] for report in reports])
        return {f"eval/{name}": value for name, value in means.items()}


class OfflineEvaluation:
    """Means over all rows of a data set, whatever the number of ranks.

    Args:
        rows: all of them, on every rank.
        pack: rows to batch, as the training loader does it.

    Raises:
        DataError: fewer rows than data-parallel ranks.
    """

    def __init__(
        self,
        algorithm: OfflineAlgorithm,
        rows: Sequence[Any],
        pack: Callable[[Sequence[Any]], Batch],
        context: ParallelContext,
    ) -> None:
        if len(rows) < context.dp_size:
            raise DataError(
                f"the evaluation data has {len(rows)} rows for {context.dp_size} data-parallel ranks: give at least as "
                "many"
            )
        self.algorithm = algorithm
        dp, size = context.coordinates.dp, context.dp_size
        # Contiguous, as in training: all ranks' rows end to end are the data set, whatever their number.
        self.rows = list(rows)[len(rows) * dp // size : len(rows) * (dp + 1) // size]
        self.num_rows = len(rows)
        self.pack = pack

    def __call__(self) -> dict[str, float]:
        """``eval/loss/total``, ``eval/rewards/accuracies`` and so on, the same on all ranks. Collective."""
        metrics = self.algorithm.evaluate(self.pack(self.rows))
        return {f"eval/{name}": value for name, value in metrics.items()} | {"eval/num_rows": float(self.num_rows)}
