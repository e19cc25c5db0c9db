"""AOT, f-divergences and LD-DPO: against plain Python, and independent of how pairs are cut over micro-batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from algorithms.ragged import Rows, check_against_oracle, check_micro_batches, gradient_of, make_inputs, totals_of
from algorithms.stand_ins import StandInWorker
from algorithms.test_preference import average, length, log_sigmoid, pair_rows, ratios, total

from megatron_rl.algorithms import DPO
from megatron_rl.algorithms.pair_fields import length_weights, matched, matched_over_ranks
from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage

BETA, SMOOTHING = 0.3, 0.1


def dpo(**config) -> DPO:
    return DPO(StandInWorker(), precomputed_reference=True, beta=BETA, **config)


def smoothed(x: float) -> float:
    return -(1 - SMOOTHING) * log_sigmoid(x) - SMOOTHING * log_sigmoid(-x)


def pairs_with_tokens(rows: Rows) -> list[tuple[dict, dict]]:
    return [(w, r) for w, r in zip(rows[0::2], rows[1::2], strict=True) if sum(w["mask"]) + sum(r["mask"])]


def sides(rows: Rows, loss: str) -> tuple[list[float], list[float]]:
    """What is sorted against what, of the pairs that have tokens."""
    pairs = pairs_with_tokens(rows)
    if loss == "aot":
        names = ("logprobs", "ref_logprobs")
        policy, reference = ([total(w, name) - total(r, name) for w, r in pairs] for name in names)
        return policy, reference
    found = [ratios(w, r) for w, r in pairs]
    return [a for a, _ in found], [b for _, b in found]


def oracle(loss: str):
    def value(rows: Rows) -> float:
        left, right = (sorted(side) for side in sides(rows, loss))
        return sum(smoothed(BETA * (a - b)) for a, b in zip(left, right, strict=True)) / len(left)

    return value


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("seed", range(3))
def test_aot_compares_sorted_with_sorted_in_value_and_gradient(loss, seed):
    rows = pair_rows(seed, scale=2.0)
    check_against_oracle(dpo(loss=loss, label_smoothing=SMOOTHING).loss, oracle(loss), rows, rtol=1e-5)


class Given(StandInWorker):
    """Writes the rows' own log-probabilities."""

    def __init__(self, batch_logprobs: torch.Tensor) -> None:
        super().__init__()
        self.batch_logprobs = batch_logprobs

    def logprobs(self, write: str) -> Stage:
        def run(batch: Batch) -> None:
            batch.tokens[write] = self.batch_logprobs.clone()

        return Stage("actor.logprobs", run, reads=("input_ids",), writes=(write,))


def batch_of(rows: Rows) -> Batch:
    """Token-aligned: each row's numbers after one prompt token."""
    batch = Batch.from_sequences([[1] * (len(row["mask"]) + 1) for row in rows], [[0, *row["mask"]] for row in rows])
    for name in ("logprobs", "ref_logprobs"):
        batch.tokens[name] = torch.tensor([value for row in rows for value in (0.0, *row[name])], dtype=torch.float64)
    return batch


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_aot_matched_over_a_step_is_the_same_however_pairs_are_cut(loss):
    rows = pair_rows(4, scale=2.0)
    batch = batch_of(rows)
    algorithm = DPO(
        Given(batch.tokens.pop("logprobs")),
        precomputed_reference=True,
        beta=BETA,
        loss=loss,
        label_smoothing=SMOOTHING,
    )
    for stage in (*algorithm.data_stages(), *algorithm.forward_stages()):
        stage.run(batch)
    fields = {name: batch[name].tolist() for name in algorithm.sequence_reads}
    assert len(fields) == (1 if loss == "aot" else 2)
    check_micro_batches(algorithm.loss, rows, [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12, 13]], fields)
    whole, alone = make_inputs(rows), make_inputs(rows, sequences=fields)
    expected, found = algorithm.loss(whole), algorithm.loss(alone)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-7)  # fields are fp32
    np.testing.assert_allclose(gradient_of(found, alone.logprobs), gradient_of(expected, whole.logprobs), rtol=1e-6)


def test_matching_leaves_out_what_is_not_there_and_breaks_ties_by_place():
    values, others = torch.tensor([3.0, 9.0, 1.0, 3.0]), torch.tensor([10.0, -5.0, 30.0, 20.0])
    present = torch.tensor([True, False, True, True])
    assert matched(values, others, present).tolist() == [20.0, -5.0, 10.0, 30.0]
    assert matched_over_ranks(values, others, present, None).tolist() == [20.0, -5.0, 10.0, 30.0]
    assert matched(values[:0], others[:0], present[:0]).shape == (0,)


SLOPES = {
    "forward_kl": lambda x, alpha: 1 - math.exp(-x),
    "js": lambda x, alpha: math.log(2 * math.exp(x) / (1 + math.exp(x))),
    "alpha": lambda x, alpha: (1 - math.exp(x) ** -alpha) / alpha,
}


@pytest.mark.parametrize("divergence", SLOPES)
@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo"])
def test_the_margin_is_that_of_the_divergence(divergence, loss):
    config = {"f_alpha": 0.3} if divergence == "alpha" else {}

    def term(w: dict, r: dict) -> float:
        left, right = (SLOPES[divergence](x, 0.3) for x in ratios(w, r))
        if loss == "sigmoid_norm":
            return -log_sigmoid(BETA * (left / length(w) - right / length(r)))
        margin = left - right
        return -log_sigmoid(BETA * margin) if loss == "sigmoid" else (margin - 1 / (2 * BETA)) ** 2

    loss_of = dpo(loss=loss, f_divergence=divergence, **config).loss
    check_against_oracle(loss_of, lambda rows: average(rows, term), pair_rows(2, scale=0.5), rtol=1e-5)


def test_the_alpha_divergence_lies_between_reverse_and_forward_kl():
    rows = pair_rows(3, scale=0.5)

    def value(**config) -> float:
        return dpo(**config).loss(make_inputs(rows)).loss.item()

    near = [value(f_divergence="alpha", f_alpha=alpha) for alpha in (1e-9, 1 - 1e-9)]
    assert near == pytest.approx([value(), value(f_divergence="forward_kl")], rel=1e-7)


@pytest.mark.parametrize("divergence", SLOPES)
def test_a_divergence_stays_finite_in_fp32_hundreds_of_nats_away(divergence):
    far = {"mask": [1, 1], "logprobs": [-400.0, -1.0], "ref_logprobs": [-1.0, -1.0]}
    near = {"mask": [1], "logprobs": [-1.0], "ref_logprobs": [-300.0]}
    for rows in ([far, near], [near, far]):
        inputs = make_inputs(rows, dtype=torch.float32)
        output = dpo(f_divergence=divergence).loss(inputs)
        assert math.isfinite(output.loss.item())
        assert torch.isfinite(torch.autograd.grad(output.loss, inputs.logprobs)[0]).all()


def test_length_weights_count_response_tokens_up_to_the_shorter_response():
    rows = [[0, 1, 1, 0, 1], [0, 0, 1], [1, 1], [0, 1, 1, 1]]  # the first token of the third is never predicted
    batch = Batch.from_sequences([[7] * len(row) for row in rows], rows)
    weighted = (length_weights(batch, 0.25) * batch["response_mask"]).tolist()
    expected = [[0, 1, 0.25, 0, 0.25], [0, 0, 1], [1, 1], [0, 1, 0.25, 0.25]]
    assert weighted == [value for row in expected for value in row]


def test_ld_dpo_scales_the_tail_of_the_longer_response():
    rows = pair_rows(5)
    for w, r in zip(rows[0::2], rows[1::2], strict=True):
        shorter = min(sum(w["mask"]), sum(r["mask"]))
        for row in (w, r):
            seen = np.cumsum(row["mask"])
            row["length_weights"] = [1.0 if count <= shorter else 0.4 for count in seen]

    def weighted(row: dict, name: str) -> float:
        values = zip(row[name], row["length_weights"], row["mask"], strict=True)
        return sum(value * weight for value, weight, m in values if m)

    def term(w: dict, r: dict) -> float:
        a, b = (weighted(row, "logprobs") - weighted(row, "ref_logprobs") for row in (w, r))
        return -log_sigmoid(BETA * (a - b))

    algorithm = dpo(ld_alpha=0.4)
    check_against_oracle(algorithm.loss, lambda rows: average(rows, term), rows, rtol=1e-5)
    batch = batch_of(rows)
    for stage in (*algorithm.data_stages(), *algorithm.forward_stages()):
        stage.run(batch)
    kept = batch["response_mask"]
    given = [weight for row in rows for weight in (0.0, *row["length_weights"])]
    assert batch["length_weights"][kept].tolist() == pytest.approx(torch.tensor(given)[kept].tolist())
    assert totals_of(rows).groups == len(pairs_with_tokens(rows))
