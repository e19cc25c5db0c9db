"""Replicas and shares of prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.rollout import RolloutPlacement


def test_neighbouring_ranks_form_a_replica() -> None:
    placement = RolloutPlacement((4, 5, 12, 13), tp=2)
    assert placement.replicas == ((4, 5), (12, 13))
    assert [placement.replica(rank) for rank in placement.ranks] == [0, 0, 1, 1]
    assert [placement.tp_rank(rank) for rank in placement.ranks] == [0, 1, 0, 1]


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 3))
def test_shares_cover_the_prompts_once_and_evenly(count: int, replicas: int, tp: int) -> None:
    placement = RolloutPlacement(tuple(range(replicas * tp)), tp)
    shares = [placement.share(count, replica) for replica in range(replicas)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_tp_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout tp=3 does not divide the 4 ranks"):
        RolloutPlacement((0, 1, 2, 3), tp=3)
