"""Every preference loss against its formula in plain Python, values and gradients, and the flows around them."""

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
    make_inputs,
    metric_value,
)
from algorithms.stand_ins import StandInWorker

from megatron_rl.algorithms import ALGORITHMS, DPO, PAIR_LOSSES, RewardModelling
from megatron_rl.algorithms.reward_modelling import append_value_tokens
from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError

MASKS = [
    ([0, 1, 1, 1, 0], [0, 1, 1, 0]),
    ([1], [1, 1, 1, 1, 1, 1]),  # a one-token answer
    ([0, 1, 0, 0, 1, 1], [0, 0, 1]),  # multi-turn
    ([0, 0], [0, 1, 1]),  # an empty chosen response
    ([0, 0, 0], [0]),  # a pair with nothing in it
    ([1, 1], [1, 1, 1]),
    ([0, 1, 1], [0, 1, 1]),  # a pair of equal responses
]


def pair_rows(seed: int = 0, scale: float = 1.0) -> Rows:
    draw = random.Random(seed)
    rows = []
    for pair in MASKS:
        for mask in pair:
            reference = [-draw.expovariate(0.5) - 0.05 for _ in mask]
            rows.append(
                {
                    "mask": mask,
                    "logprobs": [min(r + draw.gauss(0, scale), -0.01) for r in reference],
                    "ref_logprobs": reference,
                }
            )
    rows[-1] = {key: list(value) for key, value in rows[-2].items()}
    return rows


# --- oracles: one pair at a time, in floats --------------------------------------------------------------------------


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigma(x: float) -> float:
    return math.exp(log_sigmoid(x))


def total(row: dict, name: str) -> float:
    return sum(v for v, m in zip(row[name], row["mask"], strict=True) if m)


def length(row: dict) -> int:
    return max(sum(row["mask"]), 1)


def mean(row: dict, name: str) -> float:
    return total(row, name) / length(row)


def average(rows: Rows, term) -> float:
    """Mean of ``term(chosen row, rejected row)`` over pairs that have any response token."""
    pairs = [(w, r) for w, r in zip(rows[0::2], rows[1::2], strict=True) if sum(w["mask"]) + sum(r["mask"])]
    return sum(term(w, r) for w, r in pairs) / len(pairs)


def ratios(w: dict, r: dict) -> tuple[float, float]:
    return total(w, "logprobs") - total(w, "ref_logprobs"), total(r, "logprobs") - total(r, "ref_logprobs")


def formula(name: str, beta: float, s: float = 0.0, shift: float = 0.0):
    def term(w: dict, r: dict) -> float:
        a, b = ratios(w, r)
        m = a - b
        mm = a / length(w) - b / length(r)
        if name == "sigmoid":
            return -(1 - s) * log_sigmoid(beta * m) - s * log_sigmoid(-beta * m)
        if name == "sigmoid_norm":
            return -(1 - s) * log_sigmoid(beta * mm) - s * log_sigmoid(-beta * mm)
        if name == "hinge":
            return max(0.0, 1 - beta * m)
        if name == "ipo":
            return (m - 1 / (2 * beta)) ** 2
        if name == "ipo_norm":
            return (mm - 1 / (2 * beta)) ** 2
        if name == "robust":
            return (-(1 - s) * log_sigmoid(beta * m) + s * log_sigmoid(-beta * m)) / (1 - 2 * s)
        if name == "exo_pair":
            q, p = [sigma(beta * m), sigma(-beta * m)], [1 - s, s]
            logs = [log_sigmoid(beta * m), log_sigmoid(-beta * m)]
            return sum(q[i] * (logs[i] - math.log(p[i])) for i in range(2))
        if name == "nca_pair":
            return -log_sigmoid(beta * a) - 0.5 * log_sigmoid(-beta * a) - 0.5 * log_sigmoid(-beta * b)
        if name == "bco_pair":
            return -log_sigmoid(beta * a - shift) - log_sigmoid(-(beta * b - shift))
        if name == "sppo_hard":
            return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2
        if name == "apo_zero":
            return 1 - sigma(beta * a) + sigma(beta * b)
        if name == "apo_down":
            return sigma(beta * a) + 1 - sigma(beta * m)
        if name == "discopop":
            x = beta * m
            gate = sigma(x / 0.05)
            return -log_sigmoid(x) * (1 - gate) + math.exp(-x + log_sigmoid(x / 0.05))
        assert name == "sft"
        return -mean(w, "logprobs")

    return term


def dpo(**config) -> DPO:
    return DPO(actor=StandInWorker(), reference=StandInWorker("reference"), **config)


CASES = {
    "sigmoid": ({}, formula("sigmoid", 0.1)),
    "sigmoid-smoothed": ({"label_smoothing": 0.2, "beta": 0.5}, formula("sigmoid", 0.5, 0.2)),
    "sigmoid_norm": ({"loss": "sigmoid_norm", "beta": 2.0}, formula("sigmoid_norm", 2.0)),
    "sigmoid_norm-smoothed": ({"loss": "sigmoid_norm", "label_smoothing": 0.1}, formula("sigmoid_norm", 0.1, 0.1)),
    "hinge": ({"loss": "hinge", "beta": 0.4}, formula("hinge", 0.4)),
    "ipo": ({"loss": "ipo"}, formula("ipo", 0.1)),
    "ipo-norm": ({"loss": "ipo", "ipo_length_norm": True}, formula("ipo_norm", 0.1)),
    "robust": ({"loss": "robust", "label_smoothing": 0.1}, formula("robust", 0.1, 0.1)),
    "exo_pair": ({"loss": "exo_pair", "label_smoothing": 1e-3}, formula("exo_pair", 0.1, 1e-3)),
    "nca_pair": ({"loss": "nca_pair"}, formula("nca_pair", 0.1)),
    "bco_pair": ({"loss": "bco_pair"}, formula("bco_pair", 0.1)),
    "sppo_hard": ({"loss": "sppo_hard"}, formula("sppo_hard", 0.1)),
    "apo_zero": ({"loss": "apo_zero"}, formula("apo_zero", 0.1)),
    "apo_down": ({"loss": "apo_down"}, formula("apo_down", 0.1)),
    "discopop": ({"loss": "discopop"}, formula("discopop", 0.1)),
    "sft": ({"loss": "sft"}, formula("sft", 0.1)),
    "mixture": (
        {"loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}},
        lambda w, r: (
            0.8 * formula("sigmoid", 0.1)(w, r) + 0.2 * formula("bco_pair", 0.1)(w, r) + formula("sft", 0.1)(w, r)
        ),
    ),
    "mixture-smoothed": (
        {"loss": {"sigmoid": 0.8, "sft": 0.5}, "label_smoothing": 0.1},
        lambda w, r: 0.8 * formula("sigmoid", 0.1, 0.1)(w, r) + 0.5 * formula("sft", 0.1)(w, r),
    ),
}


def test_every_registered_loss_has_an_oracle_here():
    assert {
        config.get("loss", "sigmoid") for config, _ in CASES.values() if not isinstance(config.get("loss"), dict)
    } == set(PAIR_LOSSES) - {"aot", "aot_unpaired"}  # functions of all pairs: test_pair_variants


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [0.5, 30.0])
def test_loss_equals_its_formula_in_value_and_gradient(case, scale):
    config, term = CASES[case]
    check_against_oracle(dpo(**config).loss, lambda rows: average(rows, term), pair_rows(1, scale), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_loss_does_not_depend_on_micro_batches_or_context_halves(case, monkeypatch):
    algorithm = dpo(**CASES[case][0])
    check_micro_batches(algorithm.loss, pair_rows(), [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12, 13]])
    check_context_halves(algorithm.loss, pair_rows(), monkeypatch)


def test_metrics_are_means_over_pairs_of_implicit_rewards():
    rows = pair_rows()
    output = dpo(beta=0.3).loss(make_inputs(rows))
    expected = {
        "rewards/chosen": lambda a, b: 0.3 * a,
        "rewards/rejected": lambda a, b: 0.3 * b,
        "rewards/margins": lambda a, b: 0.3 * (a - b),
        "rewards/accuracies": lambda a, b: float(a > b),
    }
    for name, value in expected.items():
        want = average(rows, lambda w, r, value=value: value(*ratios(w, r)))
        assert metric_value([output], name) == pytest.approx(want, rel=1e-10), name
    assert metric_value([output], "loss/preference") == pytest.approx(output.loss.item(), rel=1e-12)


def test_a_mini_batch_of_empty_pairs_has_loss_zero():
    rows = pair_rows()[8:10]
    inputs = make_inputs(rows)
    output = dpo().loss(inputs)
    (gradient,) = torch.autograd.grad(output.loss, inputs.logprobs)
    assert output.loss.item() == 0.0
    assert (gradient == 0).all()


def test_reference_free_dpo_ignores_the_reference():
    rows = [{k: v for k, v in row.items() if k != "ref_logprobs"} for row in pair_rows()]
    zeroed = [{**row, "ref_logprobs": [0.0] * len(row["mask"])} for row in rows]
    algorithm = dpo(reference_free=True)
    assert algorithm.loss_fields == ()
    value = algorithm.loss(make_inputs(rows)).loss.item()
    assert value == pytest.approx(average(zeroed, formula("sigmoid", 0.1)), rel=1e-12)


def test_bco_shift_is_the_mean_reward_of_earlier_steps_and_survives_a_checkpoint():
    algorithm = dpo(loss="bco_pair")
    algorithm.observe({"rewards/chosen": 3.0, "rewards/rejected": 1.0})
    algorithm.observe({"rewards/chosen": 1.0, "rewards/rejected": 0.0})
    other = dpo(loss="bco_pair")
    other.load_state_dict(algorithm.state_dict())
    expected = average(pair_rows(), formula("bco_pair", 0.1, shift=1.25))
    assert other.loss(make_inputs(pair_rows())).loss.item() == pytest.approx(expected, rel=1e-12)


# --- reference-free algorithms ---------------------------------------------------------------------------------------


def simpo(w, r, beta=2.0, gamma=0.5, s=0.0):
    x = beta * (mean(w, "logprobs") - mean(r, "logprobs")) - gamma
    return -(1 - s) * log_sigmoid(x) - s * log_sigmoid(-x)


def cpo(w, r, beta=0.1, alpha=1.0):
    return -log_sigmoid(beta * (total(w, "logprobs") - total(r, "logprobs"))) - alpha * mean(w, "logprobs")


def orpo(w, r, beta=0.1):
    def log_odds(x):
        x = min(x, -1e-6)
        return x - math.log(-math.expm1(x))

    ratio = log_odds(mean(w, "logprobs")) - log_odds(mean(r, "logprobs"))
    return -mean(w, "logprobs") - beta * log_sigmoid(ratio)


FREE = {
    "simpo": ("simpo", {}, simpo),
    "simpo-smoothed": ("simpo", {"gamma": 1.5, "label_smoothing": 0.1}, lambda w, r: simpo(w, r, 2.0, 1.5, 0.1)),
    "simpo-sft": ("simpo", {"sft_weight": 0.3}, lambda w, r: simpo(w, r) - 0.3 * mean(w, "logprobs")),
    "cpo": ("cpo", {}, cpo),
    "orpo": ("orpo", {"beta": 0.5}, lambda w, r: orpo(w, r, 0.5)),
}


def free_rows() -> Rows:
    return [{key: value for key, value in row.items() if key != "ref_logprobs"} for row in pair_rows(4)]


@pytest.mark.parametrize("case", FREE)
def test_reference_free_loss_equals_its_formula_in_value_and_gradient(case, monkeypatch):
    name, config, term = FREE[case]
    algorithm = ALGORITHMS[name](actor=StandInWorker(), **config)
    check_against_oracle(algorithm.loss, lambda rows: average(rows, term), free_rows(), rtol=1e-5)
    check_micro_batches(algorithm.loss, free_rows(), [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13]])
    check_context_halves(algorithm.loss, free_rows(), monkeypatch)


# --- reward models ---------------------------------------------------------------------------------------------------


def reward_rows() -> Rows:
    draw = random.Random(7)
    masks = [[0, 0, 1], [0, 1], [1], [0, 0, 0, 1], [0, 1], [0, 1]]
    return [
        {"mask": mask, "logprobs": [0.0] * len(mask), "current_values": [draw.gauss(0, 3) for _ in mask]}
        for mask in masks
    ]


@pytest.mark.parametrize("config", [{}, {"center_coefficient": 0.1}, {"use_margins": True}], ids=str)
def test_reward_model_loss_is_bradley_terry_on_the_appended_tokens(config, monkeypatch):
    margins = {"margins": [0.5, 0.5, 0.0, 0.0, 2.0, 2.0]} if config.get("use_margins") else {}

    def oracle(rows: Rows) -> float:
        values = []
        for i in range(0, len(rows), 2):
            chosen, rejected = total(rows[i], "current_values"), total(rows[i + 1], "current_values")
            margin = margins["margins"][i] if margins else 0.0
            values.append(
                -log_sigmoid(chosen - rejected - margin)
                + config.get("center_coefficient", 0.0) * (chosen + rejected) ** 2
            )
        return sum(values) / len(values)

    algorithm = RewardModelling(StandInWorker("critic"), **config)
    check_against_oracle(algorithm.loss, oracle, reward_rows(), margins, fields=("current_values",), rtol=1e-5)
    check_micro_batches(algorithm.loss, reward_rows(), [[0, 1], [2, 3, 4, 5]], margins)
    check_context_halves(algorithm.loss, reward_rows(), monkeypatch, margins)


def test_asking_for_scores_appends_one_masked_token_to_each_sequence():
    batch = Batch.from_sequences([[5, 6, 7], [8], []], [[0, 1, 1], [1], []])
    append_value_tokens(batch)
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 7]
    assert batch["input_ids"].tolist() == [5, 6, 7, 0, 8, 0, 0]
    assert batch["response_mask"].tolist() == [False, False, False, True, False, True, True]


# --- flows and config ------------------------------------------------------------------------------------------------


def pair_batch() -> Batch:
    return Batch.from_sequences([[1, 2, 3], [1, 4], [5, 6], [5, 7, 8]], [[0, 1, 1], [0, 1], [0, 1], [0, 1, 1]])


def test_dpo_flow_runs_the_reference_then_trains_and_keeps_pairs_together():
    algorithm = dpo(num_mini_batches=2)
    flow = algorithm.update()
    assert [stage.name for stage in flow.stages] == [
        "batch.pair",
        "reference.logprobs",
        "actor.optimize",
    ]
    assert flow.reads == ("input_ids", "response_mask")
    flow(pair_batch())
    (call,) = algorithm.actor.calls
    assert call["group_field"] == "pairs"
    assert call["reads"] == ("ref_logprobs",)
    assert not call["with_entropy"]


def test_precomputed_reference_needs_no_model_and_is_read_from_the_batch():
    algorithm = DPO(actor=StandInWorker(), precomputed_reference=True)
    flow = algorithm.update()
    assert "ref_logprobs" in flow.reads
    batch = pair_batch()
    batch.tokens["ref_logprobs"] = torch.full((10,), -1.0)
    flow(batch)
    assert algorithm.actor.calls[0]["fields"]["ref_logprobs"].tolist() == [-1.0] * 10
    batch = pair_batch()
    batch.tokens["ref_logprobs"] = torch.full((10,), math.nan)
    with pytest.raises(ValueError, match="ref_logprobs = nan at token 1 of sequence 0"):
        algorithm.update()(batch)


def test_half_a_pair_is_refused():
    batch = Batch.from_sequences([[1, 2]], [[0, 1]])
    with pytest.raises(ValueError, match="1 sequences: expected chosen, rejected"):
        dpo().data_stages()[0].run(batch)


def test_missing_reference_is_refused_when_the_flow_is_built():
    with pytest.raises(ConfigError, match="precomputed_reference"):
        DPO(actor=StandInWorker()).update()
