"""KL estimators against their formulas and, in expectation, against exact divergences; the adaptive coefficient."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.algorithms.kl import AdaptiveKL, kl_penalty

POINTS = [-40.0, -20.5, -3.0, -0.2, 0.0, 0.7, 5.0, 20.5, 40.0]


def expected_value_and_slope(x: float, estimator: str) -> tuple[float, float]:
    if estimator == "k1":
        return x, 1.0
    if estimator == "k2":
        return x * x / 2, x
    held = max(-20.0, min(20.0, x))
    return math.exp(-held) - 1 + held, (1 - math.exp(-x)) if held == x else 0.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimators_equal_their_formulas_and_stay_finite_at_extreme_ratios(estimator, dtype):
    logprobs = torch.tensor(POINTS, dtype=dtype, requires_grad=True)
    values = kl_penalty(logprobs, torch.zeros_like(logprobs), estimator)
    (slopes,) = torch.autograd.grad(values.sum(), logprobs)
    rtol = 1e-12 if dtype is torch.float64 else 1e-5
    for x, value, slope in zip(POINTS, values.tolist(), slopes.tolist(), strict=True):
        expected = expected_value_and_slope(x, estimator)
        assert (value, slope) == pytest.approx(expected, rel=rtol, abs=rtol)


def exact_gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Expected gradient of each estimator by the logits of a small policy, and those of both exact divergences."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.4, 0.2, -0.6], dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    probs = logprobs.detach().exp()
    expected = {}
    for name in ("k1", "k2", "k3"):
        (expected[name],) = torch.autograd.grad(
            (probs * kl_penalty(logprobs, reference, name)).sum(), logits, retain_graph=True
        )
    forward = (logprobs.exp() * (logprobs - reference)).sum()
    backward = (reference.exp() * (reference - logprobs)).sum()
    (towards_reference,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (from_reference,) = torch.autograd.grad(backward, logits)
    values = torch.stack([(probs * kl_penalty(logprobs.detach(), reference, n)).sum() for n in ("k1", "k3")])
    torch.testing.assert_close(values, forward.detach().expand(2))
    return values, expected, towards_reference, from_reference


def test_expected_gradients_are_those_the_docstring_claims():
    _, expected, policy_reference, reference_policy = exact_gradients()
    torch.testing.assert_close(expected["k1"], torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected["k2"], policy_reference)
    torch.testing.assert_close(expected["k3"], reference_policy)


def test_adaptive_coefficient_moves_towards_the_target_and_is_clipped_at_a_fifth():
    controller = AdaptiveKL(0.2, target=6.0, horizon=1000)
    controller.update(60.0, num_samples=100)
    assert controller.coefficient == pytest.approx(0.2 * (1 + 0.2 * 0.1))
    controller.update(6.6, num_samples=50)
    assert controller.coefficient == pytest.approx(0.204 * (1 + 0.1 * 0.05))
    before = controller.coefficient
    controller.update(0.0, num_samples=1000)
    assert controller.coefficient == pytest.approx(before * 0.8)
