"""The measured gap between trainer and rollout engine: numbers by hand, and each cause told from the others."""

from __future__ import annotations

import logging
import math

import pytest
from algorithms.measured_mismatch import measure
from algorithms.stand_ins import StandInWorker

from megatron_rl.algorithms import GRPO
from megatron_rl.algorithms.rollout_mismatch import explain, response_starts, staleness
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.rollout import WeightCheck


def k3(difference: float) -> float:
    return math.exp(difference) - 1 - difference


def test_the_measures_are_those_of_the_formulas() -> None:
    found = measure([[0.1, -0.3], [0.2]], [[0, 1], [0]])
    assert found["mismatch/kl"] == pytest.approx((k3(0.1) + k3(-0.3) + k3(0.2)) / 3, rel=1e-5)
    assert found["mismatch/kl_stale"] == pytest.approx(k3(-0.3), rel=1e-5)
    assert found["mismatch/kl_fresh"] == pytest.approx((k3(0.1) + k3(0.2)) / 2, rel=1e-5)
    assert found["mismatch/kl_fresh_first_token"] == pytest.approx((k3(0.1) + k3(0.2)) / 2, rel=1e-5)
    assert found["mismatch/logprob_difference_max"] == pytest.approx(0.3)
    assert found["mismatch/log_perplexity_ratio"] == pytest.approx(0.0, abs=1e-7)
    assert found["mismatch/stale_fraction"] == pytest.approx(1 / 3)


def test_equal_policies_have_no_gap() -> None:
    assert set(measure([[0.0, 0.0]], [[0, 0]]).values()) == {0.0}


@pytest.mark.parametrize(
    ("differences", "stale", "cause"),
    [
        ([[0.001, -0.002, 0.001, 0.0]], [[0] * 4], "numerics"),
        ([[0.001, -0.9, 0.8, -0.7]], [[0, 1, 1, 2]], "staleness"),
        ([[3.0, *[0.001] * 60]], [[0] * 61], "tokenisation or masking"),
        ([[-0.9, 0.8, -0.7, 1.1]], [[0] * 4], "wrong or mixed weights"),
    ],
)
def test_each_cause_leaves_its_own_trace(differences: list[list[float]], stale: list[list[float]], cause: str) -> None:
    assert explain(measure(differences, stale), WeightCheck()).startswith(f"perhaps {cause}")


def test_checksums_of_the_servers_are_believed_before_figures() -> None:
    stale, numerics = measure([[0.001, -0.9, 0.8]], [[0, 1, 1]]), measure([[0.001, -0.002]], [[0, 0]])
    wrong = measure([[-0.9, 0.8, -0.7, 1.1]], [[0] * 4])
    found = WeightCheck(2, ("http://a:1 no longer holds what was pushed",))
    for metrics in (stale, numerics, wrong):
        assert explain(metrics, found) == "wrong or mixed weights: http://a:1 no longer holds what was pushed"
    sound = WeightCheck(2)
    assert "staleness" in explain(stale, sound)
    assert "numerics" in explain(numerics, sound)
    assert explain(wrong, sound).startswith("not the servers' weights (by their checksums 2 hold what was pushed)")


def test_staleness_counts_versions_behind_token_by_token() -> None:
    sample = Sample(Prompt([5, 6]), [7, 8, 9], [-1.0] * 3, policy_version=4, policy_version_spans=[(3, 2), (4, 1)])
    assert staleness(Batch(samples=[sample]), 5).tolist() == [0, 0, 2, 2, 1]


def test_responses_start_at_their_first_token_and_after_every_observation() -> None:
    batch = Batch.from_sequences([[1, 2, 3, 4, 5], [6, 7, 8]], [[0, 1, 1, 0, 1], [0, 1, 1]])
    assert response_starts(batch).int().tolist() == [0, 1, 0, 0, 1, 0, 1, 0]


def test_a_gap_above_the_threshold_warns_once_with_its_cause_unless_it_is_corrected(caplog) -> None:
    metrics = measure([[-0.9, 0.8, -0.7, 1.1]], [[0] * 4])
    algorithm = GRPO(StandInWorker(), kl_coefficient=0.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            algorithm.finish_step(batch := Batch(metrics=dict(metrics)))
        assert len(caplog.records) == 1
        assert "perhaps wrong or mixed weights" in caplog.text
        assert batch.metrics["mismatch/perplexity_ratio"] == pytest.approx(math.exp(-0.3 / 4), rel=1e-5)
        corrected = GRPO(StandInWorker(), kl_coefficient=0.0, correction={"level": "sequence"})
        corrected.finish_step(Batch(metrics=dict(metrics)))
    assert len(caplog.records) == 1
