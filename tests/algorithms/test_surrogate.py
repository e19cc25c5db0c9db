"""Objectives per token at chosen points, extreme ones included: value and slope worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.algorithms.surrogate import (
    cispo_surrogate,
    clipped_surrogate,
    pessimistic_log_ratio,
    soft_gate_surrogate,
    value_loss,
)

E20 = math.exp(20)


def value_and_slope(function, x: float, advantage: float, dtype=torch.float64) -> tuple[float, float]:
    point = torch.tensor([x], dtype=dtype, requires_grad=True)
    loss = function(point, torch.tensor([advantage], dtype=dtype)).loss
    (slope,) = torch.autograd.grad(loss.sum(), point)
    return loss.item(), slope.item()


# (log-ratio, advantage, loss, slope by the log-ratio): clip 0.2 below, 0.3 above, dual clip 3
CLIP_POINTS = [
    (0.0, 2.0, -2.0, -2.0),
    (math.log(1.1), 2.0, -2.2, -2.2),
    (math.log(1.5), 2.0, -2.6, 0.0),  # clipped above
    (math.log(0.5), 2.0, -1.0, -1.0),  # below, but raising it still helps
    (math.log(0.5), -2.0, 1.6, 0.0),  # clipped below
    (math.log(1.5), -2.0, 3.0, 3.0),
    (math.log(4.0), -2.0, 6.0, 0.0),  # dual clip
    (90.0, 2.0, -2.6, 0.0),
    (90.0, -2.0, 6.0, 0.0),
    (-90.0, 2.0, -2.0 / E20, 0.0),
    (-90.0, -2.0, 1.6, 0.0),
    (0.3, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("x", "advantage", "loss", "slope"), CLIP_POINTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clipped_surrogate_with_dual_clip(x, advantage, loss, slope, dtype):
    found = value_and_slope(lambda r, a: clipped_surrogate(r, a, 0.2, 0.3, 3.0), x, advantage, dtype)
    assert found == pytest.approx((loss, slope), rel=1e-5, abs=1e-8)


def test_without_dual_clip_a_negative_advantage_is_bounded_by_the_exponent_only():
    assert value_and_slope(lambda r, a: clipped_surrogate(r, a, 0.2, 0.2), 5.0, -1.0) == pytest.approx(
        (math.exp(5), math.exp(5))
    )
    assert value_and_slope(lambda r, a: clipped_surrogate(r, a, 0.2, 0.2), 90.0, -1.0) == pytest.approx((E20, 0.0))


def test_clipped_marks_exactly_the_tokens_that_lost_their_gradient_to_a_clip():
    x = torch.tensor([p[0] for p in CLIP_POINTS[:7]], dtype=torch.float64)
    a = torch.tensor([p[1] for p in CLIP_POINTS[:7]], dtype=torch.float64)
    assert clipped_surrogate(x, a, 0.2, 0.3, 3.0).clipped.tolist() == [p[3] == 0.0 for p in CLIP_POINTS[:7]]


def test_soft_gate_has_slope_minus_advantage_at_ratio_one_for_any_steepness():
    for tau in (0.5, 1.0, 1.05, 4.0):
        for advantage in (2.0, -3.0):
            _, slope = value_and_slope(lambda r, a, tau=tau: soft_gate_surrogate(r, a, tau, tau), 0.0, advantage)
            assert slope == pytest.approx(-advantage, rel=1e-12)


def test_soft_gate_takes_the_steepness_of_the_advantages_sign_and_saturates():
    def gate(r, a):
        return soft_gate_surrogate(r, a, 1.0, 2.0)

    assert value_and_slope(gate, 90.0, 1.0) == pytest.approx((-4.0, 0.0))
    assert value_and_slope(gate, 90.0, -1.0) == pytest.approx((2.0, 0.0))
    assert value_and_slope(gate, 0.0, -1.0)[0] == pytest.approx(1.0)


def test_cispo_keeps_the_gradient_where_the_weight_is_bounded():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    log_ratio = torch.tensor([90.0, -90.0, 0.5], dtype=torch.float64)
    result = cispo_surrogate(logprobs, log_ratio, torch.tensor([1.0, 1.0, -2.0]), 0.2, 4.0)
    (slope,) = torch.autograd.grad(result.loss.sum(), logprobs)
    assert slope.tolist() == pytest.approx([-5.0, -0.8, 2 * math.exp(0.5)])
    assert result.clipped.tolist() == [True, True, False]


def test_gmpo_holds_log_ratios_only_where_that_lowers_the_objective():
    x = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.1])
    a = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    assert pessimistic_log_ratio(x, a, 0.4, 0.5).tolist() == pytest.approx([0.5, -1.0, 1.0, -0.4, 0.1])


def test_value_loss_takes_the_larger_of_both_errors():
    """Old value 0, return 1, clip 0.2: at v = 0.5 the held value 0.2 is farther off; at v = 3 the value itself is."""
    values = torch.tensor([0.5, 3.0, 0.1], requires_grad=True)
    result = value_loss(values, torch.zeros(3), torch.ones(3), 0.2)
    (slope,) = torch.autograd.grad(result.loss.sum(), values)
    assert result.loss.tolist() == pytest.approx([0.32, 2.0, 0.405])
    assert slope.tolist() == pytest.approx([0.0, 2.0, -0.9])
    assert result.clipped.tolist() == [True, False, False]
