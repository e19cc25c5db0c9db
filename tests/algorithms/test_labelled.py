"""KTO, BCO and SFT against their formulas in plain Python, and KTO's estimate of the KL."""

from __future__ import annotations

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
from algorithms.test_policy_loss import AGGREGATIONS, make_rows, token_weight
from algorithms.test_preference import log_sigmoid, sigma, total
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.algorithms import ALGORITHMS, BCO, KTO
from megatron_rl.algorithms.kto_pairing import exchange_responses, mismatched_indices
from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.dataflow import Stage

MASKS = [[0, 1, 1, 0], [1], [0, 0], [0, 1, 0, 1, 1], [1, 1, 1], [0]]
LABELS = [True, False, True, False, True, False]


def labelled_rows(scale: float = 1.0) -> Rows:
    draw = random.Random(11)
    rows = []
    for mask in MASKS:
        reference = [-draw.expovariate(0.5) for _ in mask]
        rows.append(
            {"mask": mask, "logprobs": [r + draw.gauss(0, scale) for r in reference], "ref_logprobs": reference}
        )
    return rows


def average(rows: Rows, term) -> float:
    """Mean over answered sequences; labels by position."""
    values = [term(row, label) for row, label in zip(rows, LABELS, strict=True) if sum(row["mask"])]
    return sum(values) / len(values)


def ratio(row: dict) -> float:
    return total(row, "logprobs") - total(row, "ref_logprobs")


def kto_term(beta: float, kl: float, good: float, bad: float):
    def term(row, label):
        x = beta * (ratio(row) - kl)
        return good * (1 - sigma(x)) if label else bad * (1 - sigma(-x))

    return term


def bco_term(beta: float, shift: float):
    def term(row, label):
        x = beta * ratio(row) - shift
        return -log_sigmoid(x) if label else -log_sigmoid(-x)

    return term


def build(kind, **config):
    return kind(actor=StandInWorker(), reference=StandInWorker("reference"), **config)


@pytest.mark.parametrize("kl", [0.0, 2.5])
@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_kto_loss_equals_its_formula_in_value_and_gradient(kl, scale):
    algorithm = build(KTO, beta=0.2, desirable_weight=1.3, undesirable_weight=0.7)
    fields = {"labels": LABELS, "kl_logratio": [kl] * 6}
    term = kto_term(0.2, kl, 1.3, 0.7)
    check_against_oracle(algorithm.loss, lambda rows: average(rows, term), labelled_rows(scale), fields, rtol=1e-5)


def test_kto_does_not_depend_on_micro_batches_or_context_halves(monkeypatch):
    loss = build(KTO).loss
    fields = {"labels": LABELS, "kl_logratio": [0.4] * 6}
    check_micro_batches(loss, labelled_rows(), [[0], [1, 2], [3, 4, 5]], fields)
    check_context_halves(loss, labelled_rows(), monkeypatch, fields)


def test_bco_loss_is_shifted_by_the_mean_reward_of_earlier_steps():
    algorithm = build(BCO, beta=0.3)
    algorithm.observe({"rewards/mean": 0.8})
    algorithm.observe({"rewards/mean": 0.2})
    other = build(BCO, beta=0.3)
    other.load_state_dict(algorithm.state_dict())
    fields = {"labels": LABELS}
    check_against_oracle(other.loss, lambda rows: average(rows, bco_term(0.3, 0.5)), labelled_rows(), fields, rtol=1e-5)


def test_label_metrics_separate_the_classes_and_skip_empty_responses():
    rows = labelled_rows()
    output = build(BCO, beta=0.5).loss(make_inputs(rows, sequences={"labels": LABELS}))
    rewards = [0.5 * ratio(row) for row in rows]
    assert metric_value([output], "rewards/chosen") == pytest.approx((rewards[0] + rewards[4]) / 2, rel=1e-10)
    assert metric_value([output], "rewards/rejected") == pytest.approx((rewards[1] + rewards[3]) / 2, rel=1e-10)
    assert metric_value([output], "rewards/mean") == pytest.approx(sum(rewards) / 4, rel=1e-10)
    right = [(rewards[i] > 0) == LABELS[i] for i in (0, 1, 3, 4)]
    assert metric_value([output], "rewards/accuracies") == sum(right) / 4


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("", []),
        ("abcd", [1, 2, 3, 0]),
        ("aabbcc", [2, 3, 4, 5, 0, 1]),  # pairs: chosen gets chosen, rejected gets rejected
        ("abac", [1, 0, 3, 2]),  # a a b c, shifted by two
        ("aaab", [3, 0, 1, 2]),  # two of the four have no other prompt
    ],
)
def test_partners_shift_by_the_most_frequent_prompt(prompts, expected):
    assert mismatched_indices(prompts) == expected


@given(st.lists(st.integers(0, 5), max_size=20))
def test_every_response_is_taken_once_and_as_many_as_can_be_are_of_another_prompt(prompts):
    found = mismatched_indices(prompts)
    assert sorted(found) == list(range(len(prompts)))
    most = max(map(prompts.count, prompts), default=0)
    mismatched = sum(prompts[i] != prompts[j] for i, j in enumerate(found))
    assert mismatched == min(len(prompts), 2 * (len(prompts) - most))


def test_exchanging_gives_each_prompt_its_partners_response():
    batch = Batch.from_sequences(
        [[1, 2, 10, 11], [3, 20], [4, 5], [6, 30, 7, 31]], [[0, 0, 1, 1], [0, 1], [0, 0], [0, 1, 0, 1]]
    )
    batch.temperature = 0.7
    other, mismatched = exchange_responses(batch)
    assert mismatched.tolist() == [True] * 4
    rows = [part.tolist() for part in torch.split(other["input_ids"], other.lengths.tolist())]
    masks = [part.int().tolist() for part in torch.split(other["response_mask"], other.lengths.tolist())]
    assert rows == [[1, 2, 20], [3], [4, 5, 30, 7, 31], [6, 10, 11]]
    assert masks == [[0, 0, 1], [0], [0, 0, 1, 0, 1], [0, 1, 1]]
    assert other.temperature == 0.7


class TokenCounting(StandInWorker):
    """Log-probabilities that depend on the token, so that it matters which responses were used."""

    def __init__(self, name: str, per_id: float) -> None:
        super().__init__(name)
        self.per_id = per_id

    def logprobs(self, write: str) -> Stage:
        def run(batch: Batch) -> None:
            batch.tokens[write] = -self.per_id * batch["input_ids"].float()

        return Stage(f"{self.name}.logprobs", run, ("input_ids",), (write,))


@pytest.mark.parametrize(("policy", "expected"), [(0.1, 0.4 * (20 + 61 + 10) / 3), (1.0, 0.0)])
def test_kl_is_the_mean_log_ratio_of_exchanged_responses_and_never_negative(policy, expected):
    """Policy -policy * id, reference -0.5 * id: the log-ratio of a response is (0.5 - policy) times its ids' sum."""
    algorithm = KTO(actor=TokenCounting("actor", policy), reference=TokenCounting("reference", 0.5))
    batch = Batch.from_sequences(
        [[1, 2, 10], [3, 20], [4, 5], [6, 30, 7, 31]], [[0, 0, 1], [0, 1], [0, 0], [0, 1, 0, 1]]
    )
    batch.sequences["labels"] = torch.tensor([True, False, True, False])
    flow = algorithm.update()
    names = [stage.name for stage in flow.stages]
    assert names == ["reference.logprobs", "kto.mismatched_kl", "actor.optimize"]
    flow(batch)
    (call,) = algorithm.actor.calls
    assert call["fields"]["kl_logratio"].tolist() == pytest.approx([expected] * 4, rel=1e-5)
    assert call["sequence_reads"] == ("labels", "kl_logratio")


def test_a_world_of_single_sequences_is_refused_since_its_kl_would_be_zero_unnoticed():
    algorithm = KTO(actor=TokenCounting("actor", 0.1), reference=TokenCounting("reference", 0.5))
    batch = Batch.from_sequences([[1, 2, 10]], [[0, 0, 1]])
    with pytest.raises(ConfigError, match=r"at least 2 .* or set estimate_kl=False"):
        algorithm.estimate_kl(batch)


def test_answers_to_the_same_prompt_do_not_count_in_the_kl():
    """Of three answers to one prompt and one to another, two sequences find a response to the other prompt."""
    algorithm = KTO(actor=TokenCounting("actor", 0.1), reference=TokenCounting("reference", 0.5))
    rows = [[1, 10], [1, 20], [1, 30], [2, 70]]
    batch = Batch.from_sequences(rows, [[0, 1]] * 4)
    algorithm.estimate_kl(batch)
    assert batch["kl_logratio"].tolist() == pytest.approx([0.4 * (70 + 30) / 2] * 4)


def test_kto_without_an_estimate_reads_no_kl():
    algorithm = build(KTO, estimate_kl=False)
    assert [stage.name for stage in algorithm.update().stages] == [
        "reference.logprobs",
        "actor.optimize",
    ]
    term = kto_term(0.1, 0.0, 1.0, 1.0)
    check_against_oracle(
        algorithm.loss, lambda rows: average(rows, term), labelled_rows(), {"labels": LABELS}, rtol=1e-5
    )


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_sft_loss_is_the_weighted_negative_log_likelihood(mode, monkeypatch):
    rows = [{key: row[key] for key in ("mask", "logprobs")} for row in make_rows()]
    algorithm = ALGORITHMS["sft"](actor=StandInWorker(), loss_aggregation=mode, norm_length=7)

    def oracle(rows: Rows) -> float:
        return -sum(token_weight(rows, row, mode, 7) * total(row, "logprobs") for row in rows)

    output = check_against_oracle(algorithm.loss, oracle, rows)
    assert metric_value([output], "loss/sft") == pytest.approx(oracle(rows), rel=1e-10)
    check_micro_batches(algorithm.loss, rows, [[0, 1], [2, 3, 4], [5, 6, 7]])
    check_context_halves(algorithm.loss, rows, monkeypatch)
    assert [stage.name for stage in algorithm.update().stages] == ["actor.optimize"]
