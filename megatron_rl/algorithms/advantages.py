"""Advantages without a critic: pure functions of rewards and groups, ``[num_sequences]`` in and out.

A group is the samples of one prompt, all on one data-parallel rank; groups may differ in size. A group of one, or
of equal rewards, always has advantage exactly 0. Statistics are computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.moments import masked_moments
from megatron_rl.batch import Batch

STD_EPSILON = 1e-6  # added to a group's standard deviation, as in verl's compute_grpo_outcome_advantage


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Statistics of each sequence's group, ``[num_sequences]`` float64; ``uniform`` is bool."""

    count: Tensor
    mean: Tensor
    std: Tensor  # unbiased; 0 for a group of one
    uniform: Tensor  # all rewards of the group are equal (so a group of one is)


def group_statistics(rewards: Tensor, groups: Tensor) -> GroupStatistics:
    """Two-pass statistics of every group, one entry per sequence."""
    _, index = torch.unique(groups, return_inverse=True)
    rewards = rewards.double()
    num_groups = int(index.max()) + 1 if index.numel() else 0
    zeros = rewards.new_zeros(num_groups)
    count = zeros.index_add(0, index, torch.ones_like(rewards))
    mean = zeros.index_add(0, index, rewards) / count
    squares = zeros.index_add(0, index, (rewards - mean[index]).square())
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)
    std = (squares / (count - 1).clamp_min(1)).sqrt()
    return GroupStatistics(count[index], mean[index], std[index], (lowest == highest)[index])


def group_advantages(rewards: Tensor, groups: Tensor, *, normalize_std: bool) -> Tensor:
    """(r - mean) / (std + 1e-6) within the group: GRPO (arXiv 2402.03300, section 4.1.2), std unbiased as in TRL and
    verl; without the division: Dr. GRPO (arXiv 2503.20783, section 3.2)."""
    group = group_statistics(rewards, groups)
    centred = rewards.double() - group.mean
    scaled = centred / (group.std + STD_EPSILON) if normalize_std else centred
    return torch.where(group.uniform, 0.0, scaled).to(rewards.dtype)


def batch_scaled_advantages(rewards: Tensor, groups: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """(r - mean of the group) / (std of the whole batch + 1e-6): as TRL's ``scale_rewards="batch"`` (arXiv
    2508.08221, section 4.2); easy and hard prompts have the same weight.

    Args:
        group: the data-parallel ranks that hold the other sequences; all of them call together.
    """
    centred = group_advantages(rewards.double(), groups, normalize_std=False)
    deviation = masked_moments(rewards, torch.ones_like(rewards, dtype=torch.bool), group).std
    return (centred / (deviation + STD_EPSILON)).to(rewards.dtype)


def length_weighted_advantages(rewards: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """r - sum(l r) / sum(l) over the group, l the responses' tokens: the baseline of least variance where a response's
    squared gradient grows with its length, OPO (arXiv 2505.23585, eq. 12)."""
    _, index = torch.unique(groups, return_inverse=True)
    zeros = rewards.new_zeros(int(index.max()) + 1 if index.numel() else 0, dtype=torch.float64)
    weights = lengths.double()
    total = zeros.index_add(0, index, weights)[index]
    baseline = zeros.index_add(0, index, weights * rewards.double())[index] / total.clamp_min(1.0)
    centred = torch.where(total > 0, rewards.double() - baseline, 0.0)
    return torch.where(group_statistics(rewards, groups).uniform, 0.0, centred).to(rewards.dtype)


def leave_one_out_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """r_i - mean of the group's other rewards = (r_i - mean) * n / (n - 1): RLOO (arXiv 2402.14740, section 3.2)."""
    group = group_statistics(rewards, groups)
    scaled = (rewards.double() - group.mean) * group.count / (group.count - 1).clamp_min(1)
    return torch.where(group.uniform, 0.0, scaled).to(rewards.dtype)


def informative_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """Whether each sequence belongs to a group whose rewards are not all equal, ``[num_sequences]`` bool.

    The filter of dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): the other groups have no gradient; the trainer
    drops them and samples new prompts until the batch is full.
    """
    return ~group_statistics(rewards, groups).uniform


def spread_over_tokens(batch: Batch, per_sequence: Tensor) -> Tensor:
    """Give each response token its sequence's value, ``[num_sequences] -> [num_tokens]``, 0 outside the mask."""
    return per_sequence[batch.sequence_ids] * batch["response_mask"]


def sum_over_tokens(batch: Batch, per_token: Tensor) -> Tensor:
    """Sum over each sequence's response tokens, ``[num_tokens] -> [num_sequences]``; other tokens are ignored."""
    kept = torch.where(batch["response_mask"].bool(), per_token, 0.0)
    return kept.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, kept)


def at_last_token(batch: Batch, per_sequence: Tensor) -> Tensor:
    """``[num_sequences] -> [num_tokens]``: the value at each sequence's last response token, 0 elsewhere.

    The value of a sequence without response tokens is dropped.
    """
    steps = batch["response_mask"].bool().nonzero().squeeze(1)
    owner = batch.sequence_ids[steps]
    last = torch.full((batch.num_sequences,), -1, dtype=torch.int64).scatter_reduce(0, owner, steps, "amax")
    answered = last >= 0
    placed = per_sequence.new_zeros(batch.num_tokens)
    placed[last[answered]] = per_sequence[answered]
    return placed


def overlong_penalty(num_response_tokens: Tensor, max_tokens: int, cache_tokens: int) -> Tensor:
    """0 up to ``max - cache``, then falling linearly to -1 at ``max``, -1 beyond: DAPO (arXiv 2503.14476, eq. 13).

    Args:
        num_response_tokens: ``[num_sequences]`` tokens, observations not counted.
        max_tokens: hard limit of a response, tokens.
        cache_tokens: width of the falling part, tokens.
    """
    over = num_response_tokens.double() - (max_tokens - cache_tokens)
    return (-over / cache_tokens).clamp(-1.0, 0.0).float()
