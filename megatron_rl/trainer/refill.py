"""Dynamic sampling: prompts whose samples have no gradient are replaced by new ones until the batch is full.

`filled(sample, reward, algorithm, source, context)` is ``sample >> reward`` for an algorithm that keeps everything. For
one that drops samples (DAPO, arXiv 2503.14476, section 3.2) it is a stage that samples and computes rewards in rounds.
Which groups are kept is decided over all data-parallel ranks together, in the order of the prompts, and they are
redistributed evenly: the batch does not depend on the number of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_rl.algorithms import BaseAlgorithm
from megatron_rl.batch import Batch, Sample
from megatron_rl.config import ConfigError
from megatron_rl.dataflow import Flow, Stage
from megatron_rl.parallel import ParallelContext
from megatron_rl.trainer.metrics import join_rounds

REFILLS = "{} draws further prompts until a batch is full; that is not in the windowed law yet: take rollout_law=batch"

Group = list[Sample]


class PromptSource(Protocol):
    """Where further prompts come from; the loader of the run."""

    def next_batch(self) -> Batch: ...


def filled(
    sample: Stage, reward: Stage, algorithm: BaseAlgorithm, source: PromptSource, context: ParallelContext
) -> Flow:
    """Stages that turn prompts into samples worth training on, with their rewards."""
    if not algorithm.drops_samples:
        return sample >> reward
    if sample.windowed:
        raise ConfigError(REFILLS.format(algorithm.name))
    refill = Refill(sample, reward, algorithm, source, context)
    fields: tuple[tuple[str, ...], tuple[str, ...]] = ("prompts",), ("samples", "rewards")
    return Flow((Stage("actor.fill", refill, *fields, place=sample.place, generates=True, lag=sample.lag),))


class Refill:
    """Runs rounds of sampling and rewards; metrics are named ``sampling/...``."""

    def __init__(
        self, sample: Stage, reward: Stage, algorithm: BaseAlgorithm, source: PromptSource, context: ParallelContext
    ) -> None:
        self.sample, self.reward = sample, reward
        self.algorithm = algorithm
        self.source = source
        self.context = context

    def __call__(self, batch: Batch) -> None:
        wanted = len(batch.prompts) * self.context.dp_size
        kept: list[Group] = []
        dropped: list[Group] = []
        measured: list[dict[str, float]] = []
        rounds, prompts = 0, list(batch.prompts)
        while True:
            part = Batch(prompts=prompts)
            self._one_round(part)
            batch.temperature = part.temperature
            measured.append(part.metrics)
            batch.work += part.work
            good, bad = self._gather(part.samples)
            kept, dropped, rounds = kept + good, dropped + bad, rounds + 1
            if len(kept) >= wanted or rounds >= self.algorithm.max_sampling_rounds:
                break
            prompts = self.source.next_batch().prompts
        chosen = self._choose(kept, dropped, wanted)
        own = own_share(chosen, self.context.coordinates.dp, self.context.dp_size)
        batch.samples, batch.prompts = renumbered(own), [group[0].prompt for group in own]
        batch.sequences["rewards"] = torch.tensor([s.reward for s in batch.samples], dtype=torch.float32)
        batch.metrics |= join_rounds(measured) | {
            "sampling/rounds": float(rounds),
            "sampling/groups_kept": float(len(kept)),
            "sampling/groups_dropped": float(len(dropped)),
            "sampling/groups_unused": float(max(0, len(kept) - wanted)),
            "sampling/reward_mean": mean_reward(kept + dropped),
            "sampling/filled_fraction": min(1.0, len(kept) / wanted),
        }

    def _one_round(self, part: Batch) -> None:
        self.sample.execute(part, self.context.agreement)
        self.reward.execute(part, self.context.agreement)

    def _gather(self, samples: Sequence[Sample]) -> tuple[list[Group], list[Group]]:
        """The kept and the dropped groups of all data-parallel ranks, in the order of the ranks."""
        split = split_groups(samples, self.algorithm.keep_samples(samples))
        own = split if self.context.leads_replica else ([], [])
        parts = self.context.gather_objects((self.context.coordinates.dp, own))
        ordered = [found for _, found in sorted(parts, key=lambda part: part[0])]
        good = [group for found in ordered for group in found[0]]
        return good, [group for found in ordered for group in found[1]]

    def _choose(self, kept: list[Group], dropped: list[Group], wanted: int) -> list[Group]:
        """The first ``wanted``; with fewer than one for each training replica, dropped ones too, so that none is
        without work."""
        chosen = kept[:wanted]
        return chosen + dropped[: max(0, self.context.num_consumers - len(chosen))]


def split_groups(samples: Sequence[Sample], keep: Sequence[bool]) -> tuple[list[Group], list[Group]]:
    """(groups with a kept sample, reduced to their kept samples; the other groups, complete)."""
    good: list[Group] = []
    bad: list[Group] = []
    pairs = zip(samples, keep, strict=True)
    for _, members in itertools.groupby(pairs, key=lambda pair: pair[0].group):
        group = list(members)
        picked = [sample for sample, kept in group if kept]
        if picked:
            good.append(picked)
        else:
            bad.append([sample for sample, _ in group])
    return good, bad


def mean_reward(groups: Sequence[Group]) -> float:
    """Mean reward over all samples, dropped ones included."""
    rewards = [sample.reward for group in groups for sample in group if sample.reward is not None]
    return sum(rewards) / max(len(rewards), 1)


def own_share(groups: Sequence[Group], dp_rank: int, dp_size: int) -> list[Group]:
    """This rank's contiguous part of the groups; parts differ in length by at most one."""
    return list(groups[len(groups) * dp_rank // dp_size : len(groups) * (dp_rank + 1) // dp_size])


def renumbered(groups: Sequence[Group]) -> list[Sample]:
    """The samples of all groups, with ``group`` set to the position of their group."""
    for number, group in enumerate(groups):
        for sample in group:
            sample.group = number
    return [sample for group in groups for sample in group]
