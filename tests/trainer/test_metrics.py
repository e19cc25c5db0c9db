"""Metrics of several ranks, or of several rounds, become one number each by what their names say."""

from __future__ import annotations

from megatron_rl.trainer.metrics import join_rounds, reduce_metrics

PARTS = [
    {"time/score_s": 1.0, "reward/dropped_count": 5.0, "rewards/dropped_fraction": 0.5, "length_max": 3.0},
    {"time/score_s": 2.0, "reward/dropped_count": 0.0, "rewards/dropped_fraction": 0.0, "length_max": 2.0},
]


def test_counts_add_up_over_ranks_and_the_slowest_rank_is_the_time():
    assert reduce_metrics(PARTS) == {
        "length_max": 3.0,
        "reward/dropped_count": 5.0,
        "rewards/dropped_fraction": 0.25,
        "time/score_s": 2.0,
    }


def test_rounds_of_one_rank_add_up_in_time_too():
    assert join_rounds(PARTS) == reduce_metrics(PARTS) | {"time/score_s": 3.0}


def test_what_only_one_round_measured_is_kept():
    assert join_rounds([{"weight_sync/wire_bytes": 8.0}, {}]) == {"weight_sync/wire_bytes": 8.0}
