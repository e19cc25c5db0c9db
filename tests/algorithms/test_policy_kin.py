"""The kin of GRPO: each one's loss and advantages against its paper's formula, written as loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from algorithms.ragged import Rows, check_against_oracle, check_context_halves, check_micro_batches
from algorithms.stand_ins import StandInWorker
from algorithms.test_policy_loss import clamp, exp20, make_rows, without

from megatron_rl.algorithms import ALGORITHMS
from megatron_rl.batch import Batch, Prompt, Sample


def build(name: str, **config):
    config = {"old_logprobs": "recompute", **config}
    return ALGORITHMS[name](actor=StandInWorker(), **config)


def steps(row: dict) -> list[int]:
    return [t for t, m in enumerate(row["mask"]) if m]


def log_ratio(row: dict, t: int) -> float:
    return row["logprobs"][t] - row["old_logprobs"][t]


def over_tokens(rows: Rows, term) -> float:
    """Token mean of ``term(row, t)``."""
    values = [term(row, t) for row in rows for t in steps(row)]
    return sum(values) / len(values)


def over_sequences(rows: Rows, term) -> float:
    """Mean over non-empty sequences of ``term(row)``."""
    values = [term(row) for row in rows if steps(row)]
    return sum(values) / len(values)


def gspo(rows: Rows, low: float, high: float, corrected: bool = False, dual: float = math.inf) -> float:
    def term(row):
        mismatch = exp20(sum(row["old_logprobs"][t] - row["rollout_logprobs"][t] for t in steps(row)))
        weight = min(mismatch, 1.5) if corrected else 1.0
        ratio = exp20(sum(log_ratio(row, t) for t in steps(row)) / len(steps(row)))
        advantage = row["advantages"][0]
        loss = -min(ratio * advantage, clamp(ratio, 1 - low, 1 + high) * advantage)
        return (min(loss, -dual * advantage) if advantage < 0 else loss) * weight

    return over_sequences(rows, term)


def rloo(rows: Rows, low: float, high: float, dual: float = math.inf) -> float:
    def term(row):
        ratio, advantage = exp20(sum(log_ratio(row, t) for t in steps(row))), row["advantages"][0]
        loss = -min(ratio * advantage, clamp(ratio, 1 - low, 1 + high) * advantage)
        return min(loss, -dual * advantage) if advantage < 0 else loss

    return over_sequences(rows, term)


def gmpo(rows: Rows, eps: float) -> float:
    def term(row):
        advantage = row["advantages"][0]
        worst = min if advantage >= 0 else max
        logs = [worst(log_ratio(row, t), clamp(log_ratio(row, t), -eps, eps)) for t in steps(row)]
        return -advantage * exp20(sum(logs) / len(logs))

    return over_sequences(rows, term)


def sapo(rows: Rows, tau_positive: float, tau_negative: float) -> float:
    def gate(row, t):
        tau = tau_positive if row["advantages"][t] > 0 else tau_negative
        x = tau * (exp20(log_ratio(row, t)) - 1)
        sigmoid = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
        return -row["advantages"][t] * 4 / tau * sigmoid

    return over_sequences(rows, lambda row: sum(gate(row, t) for t in steps(row)) / len(steps(row)))


def dapo(rows: Rows) -> float:
    def term(row, t):
        ratio, advantage = exp20(log_ratio(row, t)), row["advantages"][t]
        return -min(ratio * advantage, clamp(ratio, 0.8, 1.28) * advantage)

    return over_tokens(rows, term)


ORACLES = {
    "gspo-narrow": ("gspo", {}, lambda rows: gspo(rows, 3e-4, 4e-4)),
    "gspo-wide": ("gspo", {"clip_low": 0.3, "clip_high": 0.4}, lambda rows: gspo(rows, 0.3, 0.4)),
    "gspo-corrected": (
        "gspo",
        {"clip_low": 0.3, "clip_high": 0.4, "correction": {"level": "sequence", "upper": 1.5}},
        lambda rows: gspo(rows, 0.3, 0.4, corrected=True),
    ),
    "gspo-dual": (
        "gspo",
        {"clip_low": 0.02, "clip_high": 0.02, "dual_clip": 1.03},
        lambda rows: gspo(rows, 0.02, 0.02, dual=1.03),
    ),
    "rloo": ("rloo", {}, lambda rows: rloo(rows, 0.2, 0.2)),
    "rloo-dual": ("rloo", {"clip_high": 0.4, "dual_clip": 1.1}, lambda rows: rloo(rows, 0.2, 0.4, 1.1)),
    "gmpo": ("gmpo", {}, lambda rows: gmpo(rows, 0.4)),
    "gmpo-tight": ("gmpo", {"clip_low": 0.1, "clip_high": 0.1}, lambda rows: gmpo(rows, 0.1)),
    "sapo": ("sapo", {}, lambda rows: sapo(rows, 1.0, 1.05)),
    "dapo": ("dapo", {}, dapo),
}


def test_the_rows_reach_the_dual_clips():
    rows = kin_rows("-dual")
    assert gspo(rows, 0.02, 0.02, dual=1.03) < gspo(rows, 0.02, 0.02) - 1e-3
    assert rloo(rows, 0.2, 0.4, 1.1) < rloo(rows, 0.2, 0.4) - 1e-3


def kin_rows(case: str = "") -> Rows:
    """For a dual clip most advantages are negative."""
    rows = without(make_rows(3), "ref_logprobs", "entropy")
    sign = -1.0 if case.endswith("-dual") else 1.0
    return [{**row, "advantages": [sign * a for a in row["advantages"]]} for row in rows]


@pytest.mark.parametrize("case", ORACLES)
def test_loss_equals_the_papers_formula_in_value_and_gradient(case):
    name, config, oracle = ORACLES[case]
    check_against_oracle(build(name, **config).loss, oracle, kin_rows(case))


@pytest.mark.parametrize(
    "case", ["rloo", "rloo-kl", "gspo-wide", "gspo-corrected", "gmpo", "sapo", "dapo", "cispo", "gspo-token", "gspo-kl"]
)
def test_loss_does_not_depend_on_micro_batches_or_context_halves(case, monkeypatch):
    others = {
        "cispo": ("cispo", {}),
        "gspo-token": ("gspo", {"token_form": True, "clip_low": 0.3, "clip_high": 0.4}),
        "rloo-kl": ("rloo", {"kl_in": "loss", "kl_coefficient": 0.1, "entropy_coefficient": 0.2}),
        "gspo-kl": ("gspo", {"kl_coefficient": 0.1, "entropy_coefficient": 0.2, "clip_low": 0.2, "clip_high": 0.2}),
    }
    name, config = ORACLES[case][:2] if case in ORACLES else others[case]
    rows = make_rows(3) if case.endswith("-kl") else kin_rows()
    algorithm = build(name, **config)
    check_micro_batches(algorithm.loss, rows, [[0], [1, 2], [3, 4], [5, 6, 7]])
    check_context_halves(algorithm.loss, rows, monkeypatch)


def test_cispo_weights_the_gradient_of_the_log_probability_by_the_clipped_ratio():
    """sg(.) has no numeric derivative, so value and gradient are stated separately."""
    from algorithms.ragged import gradient_of, make_inputs, totals_of

    rows = kin_rows()
    inputs = make_inputs(rows)
    output = build("cispo", clip_low=0.2, clip_high=0.3).loss(inputs)
    n = totals_of(rows).tokens
    weights = [
        [clamp(exp20(log_ratio(row, t)), 0.8, 1.3) if m else 0 for t, m in enumerate(row["mask"])] for row in rows
    ]
    gradient = [-w * row["advantages"][t] / n for row, ws in zip(rows, weights, strict=True) for t, w in enumerate(ws)]
    value = sum(
        -w * row["advantages"][t] * row["logprobs"][t] / n
        for row, ws in zip(rows, weights, strict=True)
        for t, w in enumerate(ws)
    )
    assert output.loss.item() == pytest.approx(value, rel=1e-12)
    assert gradient_of(output, inputs.logprobs) == pytest.approx(gradient, rel=1e-12, abs=1e-15)


def test_gspo_token_form_has_the_value_and_gradient_of_the_sequence_form():
    from algorithms.ragged import gradient_of, make_inputs

    results = []
    for token_form in (False, True):
        inputs = make_inputs(kin_rows())
        output = build("gspo", token_form=token_form, clip_low=0.3, clip_high=0.4).loss(inputs)
        results.append((output.loss.item(), gradient_of(output, inputs.logprobs)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-10, abs=1e-14)


def test_gspo_token_form_weighs_each_tokens_gradient_by_its_own_advantage():
    """sg(.) has no numeric derivative, so value and gradient are stated separately."""
    from algorithms.ragged import gradient_of, make_inputs

    rows = kin_rows()
    for row in rows:
        row["advantages"] = [a * (1 + 0.5 * (t % 3)) * (-1) ** (t // 2) for t, a in enumerate(row["advantages"])]
    inputs = make_inputs(rows)
    output = build("gspo", token_form=True, clip_low=0.1, clip_high=0.15).loss(inputs)
    value, gradient, clipped = 0.0, [], 0
    num_sequences = sum(1 for row in rows if steps(row))
    for row in rows:
        n = len(steps(row))
        mean = sum(log_ratio(row, t) for t in steps(row)) / n if n else 0.0
        ratio = exp20(mean)
        for advantage, m in zip(row["advantages"], row["mask"], strict=True):
            held = clamp(ratio, 0.9, 1.15)
            free = ratio * advantage <= held * advantage and abs(mean) < 20
            clipped += m and not free
            value -= m * min(ratio * advantage, held * advantage) / (num_sequences * max(n, 1))
            gradient.append(-m * free * ratio * advantage / (num_sequences * max(n, 1)))
    assert clipped
    assert output.loss.item() == pytest.approx(value, rel=1e-12)
    assert gradient_of(output, inputs.logprobs) == pytest.approx(gradient, rel=1e-10, abs=1e-15)


def test_rloo_on_policy_has_the_gradient_of_reinforce():
    from algorithms.ragged import gradient_of, make_inputs

    rows = kin_rows()
    inputs = make_inputs(rows)
    output = build("rloo", old_logprobs="current").loss(inputs)
    count = sum(1 for row in rows if steps(row))
    expected = [-m * a / count for row in rows for m, a in zip(row["mask"], row["advantages"], strict=True)]
    assert gradient_of(output, inputs.logprobs) == pytest.approx(expected, rel=1e-12, abs=1e-15)


# --- advantages of the kin -------------------------------------------------------------------------------------------

SPECS = [  # (group, reward, response mask, finish reason)
    (0, 1.0, [1, 1, 1], "stop"),
    (0, 0.0, [1], "stop"),
    (0, 0.5, [1, 1, 0, 0, 1, 1], "length"),
    (1, 2.0, [1, 1], "stop"),
    (1, 2.0, [1, 1, 1, 1], "stop"),
    (2, 3.0, [1, 1], "stop"),
    (3, -1.0, [], "stop"),
    (3, 1.0, [1, 1, 1, 1, 1, 1, 1, 1], "length"),
]


def make_samples() -> list[Sample]:
    samples = []
    for index, (group, reward, mask, reason) in enumerate(SPECS):
        prompt = Prompt(token_ids=[7] * (1 + index % 3), index=group)
        samples.append(
            Sample(
                prompt=prompt,
                response_ids=[9] * len(mask),
                rollout_logprobs=[-0.5 - 0.1 * t for t in range(len(mask))],
                response_mask=mask,
                finish_reason=reason,
                group=group,
                reward=reward,
            )
        )
    return samples


def packed(algorithm) -> Batch:
    batch = Batch(samples=make_samples())
    algorithm.pack_stage().run(batch)
    return batch


def per_sample(batch: Batch, field: str) -> list[list[float]]:
    """Values at the response tokens of each sample, observations included."""
    bounds = batch.cu_seqlens.tolist()
    prompts = [len(sample.prompt.token_ids) for sample in batch.samples]
    return [batch[field][a + p : b].tolist() for a, b, p in zip(bounds[:-1], bounds[1:], prompts, strict=True)]


def expect_spread(found: list[list[float]], values: list[float], rel: float = 1e-5) -> None:
    for row, value, (_, _, mask, _) in zip(found, values, SPECS, strict=True):
        assert row == pytest.approx([value * m for m in mask], rel=rel, abs=1e-6)


def test_rloo_baseline_is_the_mean_of_the_siblings():
    algorithm = build("rloo")
    batch = packed(algorithm)
    algorithm.prepare(batch)
    expect_spread(per_sample(batch, "advantages"), [0.75, -0.75, 0.0, 0.0, 0.0, 0.0, -2.0, 2.0])


def test_dapo_shapes_overlong_rewards_before_grouping():
    algorithm = build("dapo", overlong_tokens=8, overlong_cache=4, normalize_std=False)
    batch = packed(algorithm)
    algorithm.prepare(batch)
    rewards = [1.0, 0.0, 0.5, 2.0, 2.0, 3.0, -1.0, 0.0]  # the last has 8 tokens: -1
    mean0 = statistics.fmean(rewards[:3])
    expect_spread(per_sample(batch, "advantages"), [r - mean0 for r in rewards[:3]] + [0, 0, 0, -0.5, 0.5])


def test_dapo_penalises_the_length_of_truncated_responses_too():
    """Their mask is empty by then; the samples know."""
    algorithm = build("dapo", overlong_tokens=8, overlong_cache=4, normalize_std=False, mask_truncated=True)
    batch = packed(algorithm)
    assert algorithm.shaped_rewards(batch).tolist() == [1.0, 0.0, 0.5, 2.0, 2.0, 3.0, -1.0, 0.0]


def test_dapo_keeps_exactly_the_groups_with_a_gradient():
    kept = [True, True, True, False, False, False, True, True]
    assert build("dapo").keep_samples(make_samples()) == kept
    assert build("dapo", dynamic_sampling=False).keep_samples(make_samples()) == [True] * 8
    assert build("grpo").keep_samples(make_samples()) == [True] * 8


def test_masking_truncated_samples_zeroes_their_mask_but_not_their_share_in_the_baseline():
    algorithm = build("grpo", mask_truncated=True, normalize_std=False)
    batch = packed(algorithm)
    algorithm.prepare(batch)
    masks = per_sample(batch, "response_mask")
    assert [any(mask) for mask in masks] == [True, True, False, True, True, True, False, False]
    assert per_sample(batch, "advantages")[0] == [0.5, 0.5, 0.5]


def whitened(values: list[list[float]]) -> list[list[float]]:
    """Mean 0 and unbiased variance 1 over all masked tokens."""
    kept = [v for row, (_, _, mask, _) in zip(values, SPECS, strict=True) for v, m in zip(row, mask, strict=True) if m]
    mean, deviation = statistics.fmean(kept), math.sqrt(statistics.variance(kept) + 1e-8)
    return [
        [(v - mean) / deviation if m else 0.0 for v, m in zip(row, mask, strict=True)]
        for row, (_, _, mask, _) in zip(values, SPECS, strict=True)
    ]


def test_reinforce_pp_whitens_rewards_to_go_that_skip_observations():
    algorithm = build("reinforce++", gamma=0.9, kl_coefficient=0.1)
    batch = packed(algorithm)
    batch.tokens["old_logprobs"] = batch["rollout_logprobs"].clone()
    batch.tokens["ref_logprobs"] = torch.full((batch.num_tokens,), -0.8)
    algorithm.prepare(batch)
    expected = []
    for _, reward, mask, _ in SPECS:
        places = [t for t, m in enumerate(mask) if m]
        rewards = {t: -0.1 * ((-0.5 - 0.1 * t) + 0.8) + (reward if t == places[-1] else 0.0) for t in places}
        row = [0.0] * len(mask)
        for i, t in enumerate(places):
            row[t] = sum(0.9 ** (j - i) * rewards[places[j]] for j in range(i, len(places)))
        expected.append(row)
    for found, want in zip(per_sample(batch, "advantages"), whitened(expected), strict=True):
        assert found == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_reinforce_pp_baseline_centres_in_the_group_then_whitens_over_all_tokens():
    algorithm = build("reinforce++-baseline")
    batch = packed(algorithm)
    algorithm.prepare(batch)
    centred = [0.5, -0.5, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0]
    expected = whitened([[value * m for m in mask] for value, (_, _, mask, _) in zip(centred, SPECS, strict=True)])
    for found, want in zip(per_sample(batch, "advantages"), expected, strict=True):
        assert found == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_kl_in_the_reward_is_taken_off_before_grouping():
    algorithm = build("rloo", kl_coefficient=0.1)
    batch = packed(algorithm)
    batch.tokens["old_logprobs"] = batch["rollout_logprobs"].clone()
    batch.tokens["ref_logprobs"] = torch.full((batch.num_tokens,), -0.8)
    algorithm.prepare(batch)
    rewards = [
        reward - 0.1 * sum((-0.5 - 0.1 * t) + 0.8 for t, m in enumerate(mask) if m) for _, reward, mask, _ in SPECS
    ]
    siblings = {i: [j for j in range(8) if SPECS[j][0] == SPECS[i][0] and j != i] for i in range(8)}
    expected = [
        r - statistics.fmean(rewards[j] for j in siblings[i]) if siblings[i] else 0 for i, r in enumerate(rewards)
    ]
    expect_spread(per_sample(batch, "advantages"), expected, rel=1e-4)
