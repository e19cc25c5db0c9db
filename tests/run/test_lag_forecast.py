"""Forecasts of steps with a lag, against times worked out by hand."""

from __future__ import annotations

import math

import pytest

from megatron_rl.run.lag_forecast import LawForecast, Timing, bound, forecast_lag


def by_law(timing: Timing, lag: int) -> dict[str, LawForecast]:
    return {law.law: law for law in forecast_lag(timing, lag).laws}


EVEN = Timing(
    prompts_per_step=6, samples_per_prompt=2, replicas=2, slots=3, token_s=0.1, tokens_mean=20, training_s=4, push_s=0.5
)  # 12 answers of 2 s in 6 slots: 4 s


def test_turns_take_the_sum_and_a_lag_takes_the_longer_half():
    found = by_law(EVEN, 1)
    assert found["in turns"].step_s == pytest.approx(4 + 4 + 0.5)
    assert found["in turns"].training_wait_share == pytest.approx(4.5 / 8.5)
    assert found["in turns"].staleness_max == 0
    for law in ("batch", "windowed"):
        assert found[law].step_s == pytest.approx(4 + 0.5)
        assert found[law].training_wait_share == pytest.approx(0.5 / 4.5)
        assert found[law].engine_wait_share == pytest.approx(0.5 / 4.5)
        assert found[law].staleness_max == 1
    assert bound(EVEN) == pytest.approx(4.5)


@pytest.mark.parametrize(("training_s", "step_s"), [(1.0, 4.5), (9.0, 9.5)])
def test_the_longer_half_is_the_step(training_s, step_s):
    assert by_law(EVEN.model_copy(update={"training_s": training_s}), 1)["batch"].step_s == pytest.approx(step_s)


def test_running_answers_slow_one_another_down_and_rewards_and_prompts_take_their_time():
    slower = EVEN.model_copy(update={"token_s_per_running": 0.1, "reward_s": 0.25, "training_s": 0.0})
    assert by_law(slower, 0)["in turns"].step_s == pytest.approx(2 * 20 * (0.1 + 3 * 0.1) + 0.25 + 0.5)
    prompts = EVEN.model_copy(update={"sample_s": 1.0, "training_s": 0.0})
    assert by_law(prompts, 0)["in turns"].step_s == pytest.approx(2 * (2 + 1.0) + 0.5)


def test_lengths_are_lognormal_with_the_mean_given_and_cut():
    import random

    rng, timing = random.Random(0), Timing(tokens_mean=300, tokens_sigma=0.8)
    drawn = sorted(timing.length(rng) for _ in range(40_000))
    assert sum(drawn) / len(drawn) == pytest.approx(300, rel=0.02)
    assert drawn[20_000] == pytest.approx(300 * math.exp(-0.32), rel=0.03)
    assert {Timing(lengths=(3.0, 5.0)).length(rng) for _ in range(100)} == {3.0, 5.0}
    assert max(timing.model_copy(update={"tokens_max": 500}).length(rng) for _ in range(2000)) == 500


def test_long_tails_are_what_the_windowed_law_is_for():
    tail = Timing(training_s=20, token_s=0.02, tokens_mean=400, tokens_sigma=0.8, slots=64)
    found = by_law(tail, 4)
    assert found["batch"].step_s > 2 * bound(tail), "every step waits for its longest answer"
    assert found["windowed"].step_s < 1.15 * bound(tail)
    assert found["windowed"].staleness_max <= 4
    assert found["windowed"].redrawn_share < 0.05
    assert found["in turns"].step_s > found["batch"].step_s
