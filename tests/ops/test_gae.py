"""Every implementation of `gae` against a double loop over the definition, in plain Python."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_rl.ops.gae import gae
from megatron_rl.ops.selection import UnavailableError, implementations, load


def available() -> list[str]:
    names = []
    for name in implementations("gae"):
        try:
            load("gae", name, "cpu")
            names.append(name)
        except UnavailableError:
            continue
    return names


def definition(rewards, values, mask, lengths, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, as a sum over the list of a sequence's steps."""
    advantages, returns = [0.0] * len(values), [0.0] * len(values)
    start = 0
    for length in lengths:
        steps = [t for t in range(start, start + length) if mask[t]]
        deltas = [
            rewards[t] + gamma * (values[steps[i + 1]] if i + 1 < len(steps) else 0.0) - values[t]
            for i, t in enumerate(steps)
        ]
        for i, t in enumerate(steps):
            advantages[t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(steps)))
            returns[t] = advantages[t] + values[t]
        start += length
    return advantages, returns


def plain_loop(rewards, values, mask, lengths, gamma, lam):
    """The textbook's backward loop, every number in fp32."""
    advantages, start = torch.zeros(len(values)), 0
    rewards, values = torch.tensor(rewards), torch.tensor(values)
    for length in lengths:
        next_value = next_advantage = torch.zeros(())
        for t in range(start + length - 1, start - 1, -1):
            if mask[t]:
                next_advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * next_advantage
                next_value = values[t]
                advantages[t] = next_advantage
        start += length
    returns = torch.where(torch.tensor(mask), advantages + values, 0.0)
    return [advantages.tolist(), returns.tolist()]


def ragged(seed: int, lengths: list[int], density: float):
    draw = random.Random(seed)
    n = sum(lengths)
    return (
        [draw.gauss(0, 1) for _ in range(n)],
        [draw.gauss(0, 2) for _ in range(n)],
        [draw.random() < density for _ in range(n)],
    )


def run(name, rewards, values, mask, lengths, gamma, lam, dtype=torch.float64):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    found = gae(
        torch.tensor(rewards, dtype=dtype),
        torch.tensor(values, dtype=dtype),
        torch.tensor(mask, dtype=torch.bool),
        cu_seqlens,
        gamma,
        lam,
        implementation=name,
    )
    assert found[0].dtype == dtype
    return [part.tolist() for part in found]


LENGTHS = [[5, 1, 0, 9], [1], [0, 0], [33, 32, 31, 64, 65, 1], [200, 3, 1100]]
FACTORS = [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gae_equals_the_sum_of_its_definition(name, lengths, factors):
    for seed, density in enumerate([1.0, 0.6, 0.05, 0.0]):
        data = ragged(seed, lengths, density)
        expected = definition(*data, lengths, *factors)
        found = run(name, *data, lengths, *factors)
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("name", available())
def test_gae_in_fp32_is_at_most_twice_as_far_from_the_truth_as_the_plain_loop(name):
    lengths = [300, 1, 700]
    data = ragged(3, lengths, 0.8)
    data = ([float(torch.tensor(x)) for x in data[0]], [float(torch.tensor(x)) for x in data[1]], data[2])
    expected = torch.tensor(definition(*data, lengths, 0.99, 0.95))
    plain = torch.tensor(plain_loop(*data, lengths, 0.99, 0.95), dtype=torch.float64)
    found = torch.tensor(run(name, *data, lengths, 0.99, 0.95, torch.float32), dtype=torch.float64)
    assert (found - expected).abs().max() <= 2 * (plain - expected).abs().max()


@pytest.mark.parametrize("name", available())
def test_gae_never_looks_at_observation_tokens(name):
    rewards, values, mask = [0.5, 9.0, 9.0, 1.0], [0.2, 7.0, 7.0, 0.4], [True, False, False, True]
    holes = run(name, rewards, values, mask, [4], 0.9, 0.8)
    dense = run(name, [0.5, 1.0], [0.2, 0.4], [True, True], [2], 0.9, 0.8)
    for a, b in zip(holes, dense, strict=True):
        assert a == [b[0], 0.0, 0.0, b[1]]
    nan = float("nan")
    dirty = run(name, [0.5, nan, nan, 1.0], [0.2, nan, nan, 0.4], mask, [4], 0.9, 0.8)
    assert dirty == holes


@pytest.mark.parametrize("name", available())
def test_gae_of_a_sequence_does_not_depend_on_its_neighbours(name):
    data = ragged(5, [40, 70, 3], 0.7)
    together = run(name, *data, [40, 70, 3], 0.99, 0.9)
    alone = run(name, *[part[40:110] for part in data], [70], 0.99, 0.9)
    for a, b in zip(together, alone, strict=True):
        assert a[40:110] == pytest.approx(b, rel=1e-13, abs=1e-13)


def test_gae_refuses_what_does_not_fit():
    values = torch.zeros(3)
    mask = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"run from 0 to 3"):
        gae(values, values, mask, torch.tensor([0, 2]), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"\[num_tokens\] alike"):
        gae(values[:2], values, mask, torch.tensor([0, 3]), 1.0, 1.0)
    with pytest.raises(ValueError, match="bool mask"):
        gae(values, values, mask.float(), torch.tensor([0, 3]), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"gamma=1\.5"):
        gae(values, values, mask, torch.tensor([0, 3]), 1.5, 1.0)
