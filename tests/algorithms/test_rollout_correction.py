"""The mismatch correction against plain Python: bounds, rejection, veto, normalised weights, denominators."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
import torch
from algorithms.ragged import check_context_halves, check_micro_batches, make_inputs, metric_value
from algorithms.stand_ins import StandInWorker
from algorithms.test_policy_kin import make_samples

from megatron_rl.algorithms import GRPO, RLOO
from megatron_rl.algorithms.rollout_correction import RolloutCorrection, correct
from megatron_rl.algorithms.step_correction import correct_step
from megatron_rl.batch import Batch

MASKS = [[0, 1, 1, 1], [1, 0, 1], [0, 1, 1, 1, 1], [0, 0], [1]]
LEVELS = ("token", "sequence", "geometric")


def rows(seed: int = 0, spread: float = 0.5) -> list[dict[str, list[float]]]:
    draw = random.Random(seed)
    found = []
    for mask in MASKS:
        rollout = [-draw.expovariate(1.0) - 0.1 for _ in mask]
        old = [value + draw.gauss(0, spread) for value in rollout]
        row = {"mask": mask, "rollout_logprobs": rollout, "old_logprobs": old, "logprobs": list(old)}
        found.append(row | {"advantages": [draw.gauss(0, 1)] * len(mask), "staleness": [0.0] * len(mask)})
        found[-1]["response_starts"] = [0.0] * len(mask)
    return found


def ratios(row: dict, level: str) -> list[float]:
    logs = [a - b for a, b in zip(row["old_logprobs"], row["rollout_logprobs"], strict=True)]
    kept = [value for value, m in zip(logs, row["mask"], strict=True) if m]
    if level == "token":
        return [math.exp(value) for value in logs]
    total = sum(kept) if level == "sequence" else sum(kept) / max(len(kept), 1)
    return [math.exp(total)] * len(logs)


def expected(row: dict, c: RolloutCorrection) -> list[tuple[float, bool]]:
    """Weight and whether kept, of each token on the mask."""
    weights = ratios(row, c.level) if c.level != "off" else [1.0] * len(row["mask"])
    second = ratios(row, c.reject) if c.reject != "off" else [1.0] * len(row["mask"])
    veto = any(m and r < c.veto for r, m in zip(ratios(row, "token"), row["mask"], strict=True))
    found = []
    for weight, other, m in zip(weights, second, row["mask"], strict=True):
        kept = not veto
        if c.level != "off" and c.mode == "mask":
            kept &= c.lower <= weight <= c.upper
        if c.reject != "off":
            kept &= c.reject_lower <= other <= c.reject_upper
        if m:
            held = min(max(weight, c.lower), c.upper) if c.level != "off" else 1.0
            found.append((held if kept else 0.0, kept))
    return found


GRID = (
    [
        {"level": level, "mode": mode, "lower": lower, "upper": 1.4, **more}
        for level, mode, lower in itertools.product(LEVELS, ("truncate", "mask"), (0.0, 0.8))
        for more in ({}, {"veto": 0.6}, {"reject": "geometric", "reject_lower": 0.85, "reject_upper": 1.2})
    ]
    + [{"reject": level, "reject_lower": 0.7, "reject_upper": 1.3} for level in LEVELS]
    + [{"veto": 0.7}]
)


@pytest.mark.parametrize("config", GRID, ids=str)
def test_weights_and_what_is_kept_equal_the_definition(config):
    correction = RolloutCorrection(**config)
    given = rows()
    inputs = make_inputs(given)
    log_ratio = inputs.masked(inputs.fields["old_logprobs"] - inputs.fields["rollout_logprobs"])
    found, mask = correct(inputs, log_ratio, correction), inputs.fields["response_mask"]
    want = [pair for row in given for pair in expected(row, correction)]
    assert found.weights[mask].tolist() == pytest.approx([weight for weight, _ in want], rel=1e-12)
    assert found.kept[mask].tolist() == [kept for _, kept in want]


def test_the_grid_leaves_tokens_out_and_keeps_others():
    shares = [
        statistics.fmean(kept for row in rows() for _, kept in expected(row, RolloutCorrection(**config)))
        for config in GRID
        if config.get("mode") == "mask" or "veto" in config or "reject" in config
    ]
    assert sum(0.0 < share < 1.0 for share in shares) > len(shares) * 0.8


@pytest.mark.parametrize("kind", [GRPO, RLOO])
def test_a_corrected_loss_depends_neither_on_micro_batches_nor_on_context_halves(kind, monkeypatch):
    correction = {"level": "sequence", "lower": 0.5, "veto": 0.5, "reject": "geometric", "reject_lower": 0.8}
    loss = kind.without_workers(old_logprobs="recompute", correction=correction).loss
    given = [{name: row[name] for name in row if name not in ("staleness", "response_starts")} for row in rows()]
    check_micro_batches(loss, given, [[0, 1], [2], [3, 4]])
    check_context_halves(loss, given, monkeypatch)


def test_metrics_tell_weights_clips_drops_and_levels_apart():
    config = {"level": "token", "lower": 0.8, "upper": 1.2, "veto": 0.5}
    algorithm = GRPO(StandInWorker(), old_logprobs="recompute", correction=config)
    given = rows()
    output = algorithm.loss(make_inputs(given))
    want = [pair for row in given for pair in expected(row, algorithm.config.correction)]
    weights = [weight for weight, _ in want]
    on_mask = {
        level: [r for row in given for r, m in zip(ratios(row, level), row["mask"], strict=True) if m]
        for level in LEVELS
    }
    for level in LEVELS:
        assert metric_value([output], f"mismatch/ratio_{level}") == pytest.approx(statistics.fmean(on_mask[level]))
    token = on_mask["token"]
    shares = {
        "clipped_high_fraction": [r > 1.2 for r in token],
        "clipped_low_fraction": [r < 0.8 for r in token],
        "dropped_fraction": [not kept for _, kept in want],
        "vetoed_fraction": [not kept for _, kept in want],
    }
    for name, flags in shares.items():
        assert 0 < statistics.fmean(flags) < 1
        assert metric_value([output], f"mismatch/{name}") == pytest.approx(statistics.fmean(flags))
    names = ("mismatch/weight_mean", "mismatch/weight_square")
    batch = Batch(metrics={name: metric_value([output], name) for name in names})
    algorithm.finish_step(batch)
    share = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
    assert batch.metrics["mismatch/effective_sample_share"] == pytest.approx(share)
    assert "mismatch/weight_square" not in batch.metrics


def batch_of(given: list[dict]) -> Batch:
    batch = Batch.from_sequences([[1] * (len(row["mask"]) + 1) for row in given], [[0, *row["mask"]] for row in given])
    for name in ("old_logprobs", "rollout_logprobs"):
        values = [value for row in given for value in (0.0, *row[name])]
        batch.tokens[name] = torch.tensor(values, dtype=torch.float64)
    return batch


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("denominators", ["all", "kept"])
def test_normalised_weights_are_one_on_average_over_what_the_loss_divides_by(level, denominators):
    config = {"level": level, "upper": 1.6, "reject": "geometric", "reject_lower": 0.85, "reject_upper": 1.3}
    correction = RolloutCorrection(**config, normalize=True, denominators=denominators)
    given = rows(3)
    batch = batch_of(given)
    before = batch["response_mask"].clone()
    correct_step(batch, "old_logprobs", correction, None)
    want = [[*expected(row, correction)] for row in given]
    counted = [[w for w, kept in row if kept or denominators == "all"] for row in want]
    plain = [w for row in counted for w in row] if level == "token" else [statistics.fmean(r) for r in counted if r]
    mean = statistics.fmean(plain)
    found = batch["correction_weights"][before].tolist()
    assert found == pytest.approx([w / mean for row in want for w, _ in row], rel=1e-6)
    flat = [kept for row in want for _, kept in row]
    assert batch.metrics["mismatch/dropped_fraction"] == pytest.approx(1 - statistics.fmean(flat))
    assert 0 < statistics.fmean(flat) < 1
    narrowed = batch["response_mask"][before].tolist()
    assert narrowed == (flat if denominators == "kept" else [True] * len(flat))
    assert not batch["response_mask"][~before].any()


def test_a_step_hands_normalised_weights_and_the_narrowed_mask_to_the_worker():
    worker = StandInWorker()
    config = {"level": "token", "normalize": True, "reject": "token", "denominators": "kept", "reject_upper": 1.05}
    algorithm = GRPO(worker, correction=config)
    batch = Batch(samples=make_samples(), temperature=1.0)
    batch.sequences["rewards"] = torch.tensor([sample.reward for sample in batch.samples])
    algorithm.update()(batch)
    (call,) = worker.calls
    kept = call["mask"].bool()
    weights = call["fields"]["correction_weights"]
    sampled = sum(sum(sample.mask) for sample in make_samples())
    assert 0 < kept.sum() < sampled
    assert weights[kept].mean().item() == pytest.approx(1.0, rel=1e-5)
    assert batch.metrics["mismatch/dropped_fraction"] == pytest.approx(1 - kept.sum().item() / sampled)
    assert "old_logprobs" in call["fields"]


def test_the_plain_weights_are_what_they_were():
    inputs = make_inputs(rows())
    log_ratio = inputs.masked(inputs.fields["old_logprobs"] - inputs.fields["rollout_logprobs"])
    plain = correct(inputs, log_ratio, RolloutCorrection(level="token")).weights
    assert torch.equal(plain, log_ratio.exp().clamp(max=2.0))
