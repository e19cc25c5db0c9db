"""Advantages without a critic, against plain Python statistics."""

from __future__ import annotations

import random
import statistics

import pytest
import torch
from algorithms.stand_ins import StandInWorker

from megatron_rl.algorithms import ALGORITHMS
from megatron_rl.algorithms.advantages import (
    batch_scaled_advantages,
    group_advantages,
    informative_groups,
    leave_one_out_advantages,
    length_weighted_advantages,
    overlong_penalty,
    spread_over_tokens,
    sum_over_tokens,
)
from megatron_rl.batch import Batch


def ragged_groups(seed: int) -> tuple[list[float], list[int]]:
    """Groups of size 1 to 6 in mixed order, one of them with equal rewards."""
    draw = random.Random(seed)
    pairs = [(draw.gauss(0, 2), group) for group, size in [(7, 1), (3, 2), (0, 6), (4, 5)] for _ in range(size)]
    pairs += [(0.1, 9)] * 3
    draw.shuffle(pairs)
    return [reward for reward, _ in pairs], [group for _, group in pairs]


def others(rewards: list[float], groups: list[int], i: int) -> list[float]:
    return [r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == groups[i] and j != i]


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_group_advantages_equal_textbook_statistics_of_ragged_groups(seed, normalize_std):
    rewards, groups = ragged_groups(seed)
    found = group_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), normalize_std=normalize_std
    )
    for i, value in enumerate(found.tolist()):
        group = [rewards[i], *others(rewards, groups, i)]
        if len(set(group)) == 1:
            assert value == 0.0
            continue
        expected = rewards[i] - statistics.fmean(group)
        if normalize_std:
            expected /= statistics.stdev(group) + 1e-6
        assert value == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_subtracts_the_mean_of_the_others(seed):
    rewards, groups = ragged_groups(seed)
    found = leave_one_out_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    for i, value in enumerate(found.tolist()):
        rest = others(rewards, groups, i)
        expected = rewards[i] - statistics.fmean(rest) if rest and len({rewards[i], *rest}) > 1 else 0.0
        assert value == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_equal_rewards_give_exactly_zero_in_fp32_although_their_mean_is_rounded():
    rewards = torch.full((7,), 0.1)
    assert group_advantages(rewards, torch.zeros(7, dtype=torch.int64), normalize_std=True).tolist() == [0.0] * 7
    assert leave_one_out_advantages(rewards, torch.zeros(7, dtype=torch.int64)).tolist() == [0.0] * 7


def test_advantages_of_an_empty_batch_are_empty():
    none = torch.zeros(0)
    assert group_advantages(none, torch.zeros(0, dtype=torch.int64), normalize_std=True).shape == (0,)


def test_dynamic_sampling_keeps_exactly_the_groups_with_unequal_rewards():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 0.0])
    groups = torch.tensor([5, 5, 2, 2, 8, 5])
    assert informative_groups(rewards, groups).tolist() == [True, True, False, False, False, True]


def test_overlong_penalty_is_zero_then_linear_then_minus_one():
    lengths = torch.tensor([0, 60, 80, 85, 90, 100, 101, 500])
    expected = [0, 0, 0, -0.25, -0.5, -1, -1, -1]
    assert overlong_penalty(lengths, max_tokens=100, cache_tokens=20).tolist() == pytest.approx(expected)


def test_spreading_and_summing_respect_the_mask():
    batch = Batch.from_sequences([[1, 2, 3], [4], [5, 6]], [[0, 1, 1], [0], [1, 0]])
    assert spread_over_tokens(batch, torch.tensor([2.0, 3.0, 5.0])).tolist() == [0, 2, 2, 0, 5, 0]
    sums = sum_over_tokens(batch, torch.tensor([float("nan"), 1.0, 2.0, float("inf"), 4.0, 8.0]))
    assert sums.tolist() == [3.0, 0.0, 4.0]


@pytest.mark.parametrize("seed", range(3))
def test_batch_scaled_and_length_weighted_advantages_equal_plain_statistics(seed):
    rewards, groups = ragged_groups(seed)
    draw = random.Random(seed)
    lengths = [draw.randint(0, 9) for _ in rewards]
    given, ids = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)
    scaled = batch_scaled_advantages(given, ids).tolist()
    weighted = length_weighted_advantages(given, ids, torch.tensor(lengths)).tolist()
    deviation = statistics.stdev(rewards)
    for i, reward in enumerate(rewards):
        places = [j for j, group in enumerate(groups) if group == groups[i]]
        if len({rewards[j] for j in places}) == 1:
            assert scaled[i] == weighted[i] == 0.0
            continue
        mean = statistics.fmean(rewards[j] for j in places)
        assert scaled[i] == pytest.approx((reward - mean) / (deviation + 1e-6), rel=1e-9)
        tokens = sum(lengths[j] for j in places)
        baseline = sum(lengths[j] * rewards[j] for j in places) / tokens if tokens else reward
        assert weighted[i] == pytest.approx(reward - baseline, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("name", "config"), [("rloo", {}), ("grpo", {"normalize_std": "batch"}), ("opo", {})])
def test_normalised_advantages_have_mean_zero_and_variance_one_over_responses(name, config):
    batch = Batch.from_sequences([[1, 2, 3]] * 6, [[0, 1, 1]] * 3 + [[0, 0, 1]] * 3)
    batch.sequences |= {
        "rewards": torch.tensor([1.0, 0.0, 0.5, 2.0, 3.0, 1.0]),
        "groups": torch.tensor([0, 0, 0, 1, 1, 1]),
    }
    plain, normal = (
        ALGORITHMS[name](StandInWorker(), config={**config, "normalize_advantages": on}) for on in (False, True)
    )
    found = []
    for algorithm in (plain, normal):
        algorithm.prepare(batch)
        found.append(batch["advantages"].view(6, 3)[:, 2].tolist())
    mean, deviation = statistics.fmean(found[0]), statistics.stdev(found[0])
    assert found[1] == pytest.approx([(value - mean) / deviation for value in found[0]], rel=1e-5)
