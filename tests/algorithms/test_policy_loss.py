"""The shared policy-gradient loss against a loop in plain Python, values and gradients."""

from __future__ import annotations

import math
import random

import pytest
import torch
from algorithms.ragged import (
    Rows,
    check_against_oracle,
    check_context_halves,
    check_micro_batches,
    gradient_of,
    make_inputs,
    metric_value,
    totals_of,
)
from algorithms.stand_ins import StandInWorker

from megatron_rl.algorithms import GRPO, DrGRPO
from megatron_rl.config import ConfigError

AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "fixed-length"]


def make_rows(seed: int = 0) -> Rows:
    """Eight sequences: ordinary, multi-turn with a hole, one token, empty, fully masked, and with extreme ratios."""
    draw = random.Random(seed)
    masks = [
        [0, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1, 1, 1, 0],
        [1],
        [0, 0, 0],
        [0],
        [0, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 0],
    ]
    rows = []
    for index, mask in enumerate(masks):
        old = [-draw.expovariate(0.7) for _ in mask]
        spread = 45.0 if index == 5 else 0.35
        new = [value + draw.uniform(-1, 1) * spread for value in old]
        rows.append(
            {
                "mask": mask,
                "logprobs": new,
                "old_logprobs": old,
                "rollout_logprobs": [value + draw.gauss(0, 0.3) for value in old],
                "ref_logprobs": [value + draw.gauss(0, 0.5) for value in old],
                "advantages": [[-1.7, 0.6, -0.4, 1.0, 1.0, 0.8, 1.3, 0.0][(index + seed) % 8]] * len(mask),
                "entropy": [draw.uniform(0, 3) for _ in mask],
            }
        )
    rows[5]["logprobs"][1:4] = [rows[5]["old_logprobs"][1] + 33.0, rows[5]["old_logprobs"][2] - 38.0, -90.0]
    rows[5]["advantages"] = [0.8] * 5
    rows[5]["ref_logprobs"][1:4] = [rows[5]["logprobs"][1] - 40.0, rows[5]["logprobs"][2] + 0.3, -91.0]
    return rows


def clamp(value: float, low: float, high: float) -> float:
    return low if value < low else high if value > high else value


def exp20(value: float) -> float:
    return math.exp(clamp(value, -20, 20))


def token_weight(rows: Rows, row: dict, mode: str, norm_length: float) -> float:
    num_tokens = sum(sum(r["mask"]) for r in rows)
    num_sequences = sum(1 for r in rows if sum(r["mask"]))
    return {
        "token-mean": 1 / num_tokens,
        "seq-mean-token-sum": 1 / num_sequences,
        "seq-mean-token-mean": 1 / num_sequences / max(sum(row["mask"]), 1),
        "fixed-length": 1 / num_sequences / norm_length,
    }[mode]


def clip_term(x: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    ratio = exp20(x)
    term = max(-advantage * ratio, -advantage * clamp(ratio, 1 - low, 1 + high))
    return min(term, -advantage * dual) if dual and advantage < 0 else term


def kl_term(x: float, estimator: str) -> float:
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x * x / 2
    x = clamp(x, -20, 20)
    return math.exp(-x) - 1 + x


def correction_weight(row: dict, t: int, level: str, mode: str, low: float, high: float) -> float:
    if level == "off":
        return 1.0
    places = [t] if level == "token" else [i for i, m in enumerate(row["mask"]) if m]
    total = sum(row["old_logprobs"][i] - row["rollout_logprobs"][i] for i in places)
    weight = exp20(total / len(places) if level == "geometric" else total)
    if mode == "truncate":
        return min(weight, high)
    return weight if low <= weight <= high else 0.0


def oracle(rows: Rows, **c) -> float:
    """-E[min(r A, clip(r) A)] + beta KL - alpha H, one token at a time."""
    total = 0.0
    for row in rows:
        for t, m in enumerate(row["mask"]):
            if not m:
                continue
            weight = token_weight(rows, row, c.get("loss_aggregation", "seq-mean-token-mean"), c.get("norm_length", 1))
            x = row["logprobs"][t] - row["old_logprobs"][t]
            term = clip_term(
                x, row["advantages"][t], c.get("clip_low", 0.2), c.get("clip_high", 0.2), c.get("dual_clip")
            )
            corr = c.get("correction", {"level": "off"})
            term *= correction_weight(
                row, t, corr["level"], corr.get("mode", "truncate"), corr.get("lower", 0), corr.get("upper", 2)
            )
            if c.get("kl_coefficient"):
                kl = kl_term(row["logprobs"][t] - row["ref_logprobs"][t], c.get("kl_estimator", "k3"))
                term += c["kl_coefficient"] * kl
            term -= c.get("entropy_coefficient", 0.0) * row["entropy"][t]
            total += weight * term
    return total


def grpo(**config) -> GRPO:
    config = {"old_logprobs": "recompute", **config}
    return GRPO(actor=StandInWorker(), reference=StandInWorker(), **config)


def without(rows: Rows, *names: str) -> Rows:
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


CASES = [
    {"loss_aggregation": mode, **({"norm_length": 12} if mode == "fixed-length" else {})} for mode in AGGREGATIONS
] + [
    {"clip_low": 0.1, "clip_high": 0.3},
    {"dual_clip": 3.0},
    {"kl_coefficient": 0.05, "kl_estimator": "k1"},
    {"kl_coefficient": 0.05, "kl_estimator": "k2"},
    {"kl_coefficient": 0.05, "kl_estimator": "k3", "loss_aggregation": "token-mean"},
    {"entropy_coefficient": 0.01},
    {"correction": {"level": "token"}},
    {"correction": {"level": "token", "mode": "mask", "lower": 0.8, "upper": 1.25}},
    {"correction": {"level": "sequence", "upper": 1.1}},
    {"correction": {"level": "sequence", "mode": "mask", "lower": 0.5, "upper": 2.0}, "kl_coefficient": 0.1},
    {"correction": {"level": "geometric", "upper": 1.02}},
    {"correction": {"level": "geometric", "mode": "mask", "lower": 0.9, "upper": 1.1}, "entropy_coefficient": 0.1},
]


@pytest.mark.parametrize("config", CASES, ids=str)
def test_policy_loss_equals_the_loop_in_value_and_gradient(config):
    rows = make_rows() if config.get("kl_coefficient") else without(make_rows(), "ref_logprobs")
    check_against_oracle(grpo(**config).loss, lambda r: oracle(r, **config), rows, fields=("logprobs", "entropy"))


@pytest.mark.parametrize("config", CASES, ids=str)
def test_policy_loss_is_the_same_for_any_micro_batches(config):
    rows = make_rows() if config.get("kl_coefficient") else without(make_rows(), "ref_logprobs")
    check_micro_batches(grpo(**config).loss, rows, [[0], [1, 2], [3, 4], [5, 6, 7]])


@pytest.mark.parametrize("config", CASES, ids=str)
def test_policy_loss_is_the_same_when_context_parallel_ranks_hold_halves(config, monkeypatch):
    rows = make_rows() if config.get("kl_coefficient") else without(make_rows(), "ref_logprobs")
    check_context_halves(grpo(**config).loss, rows, monkeypatch)


def test_policy_loss_ignores_nan_and_infinity_outside_the_mask():
    clean = make_rows()
    dirty = make_rows()
    for row in dirty:
        for t, m in enumerate(row["mask"]):
            if not m:
                row.update({k: [*v[:t], math.nan, *v[t + 1 :]] for k, v in row.items() if k != "mask"})
    loss = grpo(kl_coefficient=0.1, entropy_coefficient=0.1, correction={"level": "sequence"}).loss
    inputs = make_inputs(dirty)
    output = loss(inputs)
    assert output.loss.item() == loss(make_inputs(clean)).loss.item()
    gradient = gradient_of(output, inputs.logprobs)
    assert (gradient[~inputs.fields["response_mask"].numpy()] == 0).all()
    assert math.isfinite(abs(gradient).sum())


def test_policy_loss_of_a_mini_batch_without_response_tokens_is_zero_not_nan():
    rows = [row for row in make_rows() if not sum(row["mask"])]
    for mode in AGGREGATIONS:
        inputs = make_inputs(rows)
        output = grpo(loss_aggregation=mode, norm_length=4, kl_coefficient=0.1).loss(inputs)
        assert output.loss.item() == 0.0
        assert (gradient_of(output, inputs.logprobs) == 0).all()


def test_on_policy_ratio_is_one_and_its_gradient_is_the_plain_policy_gradient():
    rows = without(make_rows(), "ref_logprobs", "old_logprobs")
    algorithm = grpo(old_logprobs="current", loss_aggregation="token-mean")
    inputs = make_inputs(rows)
    output = algorithm.loss(inputs)
    mask, advantages = inputs.mask.double(), inputs.fields["advantages"]
    torch.testing.assert_close(
        torch.from_numpy(gradient_of(output, inputs.logprobs)), -(advantages * mask) / mask.sum(), rtol=1e-12, atol=0
    )
    assert metric_value([output], "policy/ratio_mean") == 1.0
    assert metric_value([output], "policy/approx_kl") == 0.0
    assert metric_value([output], "policy/clip_fraction") == 0.0


def test_policy_metrics_are_masked_means():
    rows = make_rows()
    output = grpo(kl_coefficient=0.05, loss_aggregation="token-mean").loss(make_inputs(rows))
    kept = [(row, t) for row in rows for t, m in enumerate(row["mask"]) if m]
    ratios = [exp20(row["logprobs"][t] - row["old_logprobs"][t]) for row, t in kept]
    kl = [kl_term(row["logprobs"][t] - row["ref_logprobs"][t], "k3") for row, t in kept]
    entropy = [row["entropy"][t] for row, t in kept]
    clipped = [
        (a > 0 and r > 1.2) or (a < 0 and r < 0.8)
        for r, a in zip(ratios, [row["advantages"][t] for row, t in kept], strict=True)
    ]
    n = totals_of(rows).tokens
    assert metric_value([output], "policy/ratio_mean") == pytest.approx(sum(ratios) / n, rel=1e-12)
    assert metric_value([output], "loss/kl") == pytest.approx(sum(kl) / n, rel=1e-12)
    assert metric_value([output], "policy/entropy") == pytest.approx(sum(entropy) / n, rel=1e-12)
    assert metric_value([output], "policy/clip_fraction") == pytest.approx(sum(clipped) / n, rel=1e-12)
    assert metric_value([output], "loss/policy") == pytest.approx(
        oracle(rows, loss_aggregation="token-mean"), rel=1e-12
    )


def test_fixed_length_without_its_length_is_refused():
    with pytest.raises(ConfigError, match="norm_length"):
        DrGRPO(actor=StandInWorker())


def test_unknown_setting_names_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean 'clip_high'"):
        GRPO(actor=StandInWorker(), clip_hihg=0.3)


def test_kl_without_reference_is_refused_when_the_flow_is_built():
    with pytest.raises(ConfigError, match=r"kl_coefficient=0.1 needs reference=\.\.\."):
        GRPO(actor=StandInWorker(), kl_coefficient=0.1).forward_stages()
