"""PPO: its critic loss, its advantages, its adaptive coefficient, and the order of its stages."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from algorithms.ragged import Rows, check_against_oracle, check_context_halves, check_micro_batches, metric_value
from algorithms.stand_ins import StandInWorker
from algorithms.test_policy_kin import SPECS, make_samples, packed, per_sample

from megatron_rl.algorithms import PPO
from megatron_rl.algorithms.advantages import at_last_token
from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError


def build(**config) -> PPO:
    critic = StandInWorker("critic", {"loss/value": 0.5, "loss/total": 0.5, "optimizer/gradient_norm": 2.0})
    return PPO(actor=StandInWorker(), critic=critic, reference=StandInWorker("reference"), **config)


def value_rows() -> Rows:
    draw = random.Random(1)
    masks = [[0, 1, 1, 1, 0], [1], [0, 0], [1, 0, 1, 1], [1, 1]]
    rows = []
    for mask in masks:
        old = [draw.gauss(0, 1) for _ in mask]
        rows.append(
            {
                "mask": mask,
                "logprobs": [0.0] * len(mask),
                "values": old,
                "current_values": [v + draw.uniform(-0.6, 0.6) for v in old],
                "returns": [v + draw.uniform(-1, 1) for v in old],
            }
        )
    rows[4]["current_values"] = [1e4, -1e4]
    return rows


def value_oracle(rows: Rows, clip: float | None) -> float:
    terms = []
    for row in rows:
        for t, m in enumerate(row["mask"]):
            if m:
                v, old, target = row["current_values"][t], row["values"][t], row["returns"][t]
                near = v if clip is None else old + max(-clip, min(clip, v - old))
                terms.append(0.5 * max((v - target) ** 2, (near - target) ** 2))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_is_half_the_larger_squared_error_in_value_and_gradient(clip):
    algorithm = build(value_clip=clip)
    check_against_oracle(
        algorithm.critic_loss,
        lambda rows: value_oracle(rows, clip),
        value_rows(),
        fields=("current_values",),
        rtol=1e-5,
    )


def test_value_loss_does_not_depend_on_micro_batches_or_context_halves(monkeypatch):
    loss = build().critic_loss
    check_micro_batches(loss, value_rows(), [[0, 1], [2], [3, 4]])
    check_context_halves(loss, value_rows(), monkeypatch)


def ready_batch(algorithm: PPO) -> tuple[Batch, list[list[float]]]:
    batch = packed(algorithm)
    draw = random.Random(2)
    batch.tokens["values"] = torch.tensor([draw.gauss(0, 1) for _ in range(batch.num_tokens)])
    batch.tokens["old_logprobs"] = batch["rollout_logprobs"].clone()
    batch.tokens["ref_logprobs"] = torch.full((batch.num_tokens,), -0.8)
    return batch, per_sample(batch, "values")


def expected_advantages(values: list[list[float]], beta: float, gamma: float, lam: float) -> list[dict[int, float]]:
    """Sums of discounted TD errors over each sample's own steps."""
    result = []
    for (_, reward, mask, _), value in zip(SPECS, values, strict=True):
        places = [t for t, m in enumerate(mask) if m]
        deltas = []
        for i, t in enumerate(places):
            r = -beta * ((-0.5 - 0.1 * t) + 0.8) + (reward if i == len(places) - 1 else 0.0)
            following = value[places[i + 1]] if i + 1 < len(places) else 0.0
            deltas.append(r + gamma * following - value[t])
        result.append(
            {t: sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(places))) for i, t in enumerate(places)}
        )
    return result


@pytest.mark.parametrize("whiten", [True, False])
def test_prepare_places_rewards_at_the_last_token_and_the_kl_at_every_token(whiten):
    algorithm = build(gamma=0.97, lam=0.9, kl_coefficient=0.2, whiten_advantages=whiten)
    batch, values = ready_batch(algorithm)
    algorithm.prepare(batch)
    expected = expected_advantages(values, 0.2, 0.97, 0.9)
    kept = [a for row in expected for a in row.values()]
    mean, deviation = statistics.fmean(kept), math.sqrt(statistics.variance(kept) + 1e-8)
    rows = zip(expected, per_sample(batch, "advantages"), per_sample(batch, "returns"), values, strict=True)
    for want, advantages, returns, value in rows:
        for t, found in enumerate(advantages):
            plain = want.get(t)
            scaled = 0.0 if plain is None else (plain - mean) / deviation if whiten else plain
            assert found == pytest.approx(scaled, rel=1e-4, abs=1e-5)
            assert returns[t] == pytest.approx(0.0 if plain is None else plain + value[t], rel=1e-4, abs=1e-5)


def test_explained_variance_is_one_for_a_perfect_critic_and_kl_is_reported_per_response():
    algorithm = build(kl_coefficient=0.2)
    batch, _ = ready_batch(algorithm)
    algorithm.prepare(batch)
    kl = [sum((-0.5 - 0.1 * t) + 0.8 for t, m in enumerate(mask) if m) for _, _, mask, _ in SPECS]
    assert batch.metrics["policy/reference_kl"] == pytest.approx(statistics.fmean(kl), rel=1e-5)
    assert batch.metrics["policy/num_responses"] == len(SPECS)
    batch.tokens["values"] = batch["returns"].clone()
    metrics = algorithm.value_metrics(batch, batch["returns"])
    assert metrics["values/explained_variance"] == pytest.approx(1.0)


def test_reward_goes_to_the_last_masked_token_and_an_empty_response_loses_it():
    batch = Batch.from_sequences([[1, 2, 3, 4], [5, 6], [7]], [[0, 1, 1, 0], [0, 0], [1]])
    assert at_last_token(batch, torch.tensor([2.0, 3.0, 5.0])).tolist() == [0, 0, 2, 0, 0, 0, 5]


def test_flow_scores_then_prepares_then_trains_the_critic_before_the_actor():
    algorithm = build(num_epochs=2, kl_coefficient=0.1)
    flow = algorithm.update()
    names = [stage.name for stage in flow.stages]
    assert names == [
        "batch.pack",
        "actor.logprobs",
        "reference.logprobs",
        "critic.values",
        "ppo.prepare",
        "critic.optimize",
        "actor.optimize",
    ]
    assert flow.reads == ("samples", "rewards")
    assert all(name in str(flow) for name in names)


def run_update(algorithm: PPO) -> Batch:
    batch = Batch(samples=make_samples())
    batch.sequences["rewards"] = torch.tensor([sample.reward for sample in batch.samples])
    return algorithm.update()(batch)


def test_critic_warm_up_leaves_the_actor_alone_for_that_many_updates():
    algorithm = build(critic_warmup_steps=2, kl_coefficient=0.1)
    for _ in range(3):
        batch = run_update(algorithm)
    assert len(algorithm.critic.calls) == 3
    assert len(algorithm.actor.calls) == 1
    assert batch.metrics["critic/gradient_norm"] == 2.0
    assert "loss/total" not in batch.metrics


def test_adaptive_coefficient_follows_the_measured_kl_and_survives_a_checkpoint():
    algorithm = build(kl_coefficient=0.1, kl_target=1e-3, kl_horizon=80)
    run_update(algorithm)
    assert algorithm.kl_coefficient == pytest.approx(0.1 * (1 + 0.2 * len(SPECS) / 80))
    other = build(kl_coefficient=0.1, kl_target=1e-3, kl_horizon=80)
    other.load_state_dict(algorithm.state_dict())
    assert (other.kl_coefficient, other.step) == (algorithm.kl_coefficient, 1)


def test_a_reference_alone_switches_the_usual_penalty_on():
    assert build().kl_coefficient == 0.05
    assert PPO(actor=StandInWorker(), critic=StandInWorker("critic")).kl_coefficient == 0.0


def shared(**config) -> PPO:
    return PPO(actor=StandInWorker(), shared_critic=True, kl_coefficient=0.0, **config)


def test_a_shared_critic_needs_no_second_model():
    algorithm = shared(critic_warmup_steps=1)
    names = [stage.name for stage in algorithm.update().stages]
    assert names == ["batch.pack", "actor.values", "ppo.prepare", "actor.optimize"]
    assert {"values", "returns", "advantages"} <= set(algorithm.loss_fields)
    assert algorithm.is_warming_up
    algorithm.step = 1
    assert not algorithm.is_warming_up


def shared_rows() -> Rows:
    draw = random.Random(5)
    rows = value_rows()
    for row in rows:
        row["old_logprobs"] = [-draw.expovariate(0.7) - 0.05 for _ in row["mask"]]
        row["logprobs"] = [old + draw.uniform(-0.5, 0.5) for old in row["old_logprobs"]]
        row["advantages"] = [draw.gauss(0, 1) for _ in row["mask"]]
    rows[4]["current_values"] = [0.3, -0.4]
    return rows


def policy_oracle(rows: Rows) -> float:
    terms = []
    for row in rows:
        for t, m in enumerate(row["mask"]):
            if m:
                ratio, advantage = math.exp(row["logprobs"][t] - row["old_logprobs"][t]), row["advantages"][t]
                terms.append(-min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage))
    return sum(terms) / len(terms)


def test_a_shared_critic_adds_its_weighted_loss_to_the_policys_in_value_and_both_gradients(monkeypatch):
    algorithm = shared(value_coefficient=0.3, value_clip=0.2, old_logprobs="recompute", log_entropy=False)
    output = check_against_oracle(
        algorithm.loss,
        lambda rows: policy_oracle(rows) + 0.3 * value_oracle(rows, 0.2),
        shared_rows(),
        fields=("logprobs", "current_values"),
        rtol=1e-5,
    )
    assert metric_value([output], "loss/policy") == pytest.approx(policy_oracle(shared_rows()), rel=1e-9)
    assert metric_value([output], "loss/value") == pytest.approx(value_oracle(shared_rows(), 0.2), rel=1e-9)
    check_micro_batches(algorithm.loss, shared_rows(), [[0, 1], [2, 3], [4]])
    check_context_halves(algorithm.loss, shared_rows(), monkeypatch)


def test_while_a_shared_critic_warms_up_the_policy_has_no_gradient():
    algorithm = shared(value_coefficient=0.3, old_logprobs="recompute", critic_warmup_steps=1)
    check_against_oracle(
        algorithm.loss,
        lambda rows: 0.3 * value_oracle(rows, 0.2),
        shared_rows(),
        fields=("logprobs", "current_values"),
        rtol=1e-5,
    )


def test_missing_critic_and_meaningless_targets_are_refused():
    with pytest.raises(ConfigError, match=r"GAE .* needs critic=\.\.\."):
        PPO(actor=StandInWorker())
    with pytest.raises(ConfigError, match="kl_in='reward'"):
        build(kl_target=6.0, kl_in="loss")
